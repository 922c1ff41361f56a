"""The token loss of one optimiser step: combines c3po's surrogate, normalisation and corrections as configured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from c3po import (
    Max,
    StepTotals,
    SumCount,
    distilled_advantages,
    geometric_mean_mask,
    icepop_weights,
    kpop_weights,
    mismatch_diagnostics,
    packed_sequence_ids,
    policy_loss,
    tis_weights,
    token_veto_mask,
    topk_distillation_loss,
    weight_sums,
)
from megatron_rl.batch import own_function
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.types import PackedMicrobatch


@dataclass(frozen=True)
class TokenObjective:
    """TokenLoss of one optimiser step: algo.objective, algo.loss, and the weights against engine-trainer mismatch."""

    algo: AlgoConfig
    totals: StepTotals

    def __call__(self, batch: PackedMicrobatch, logprobs_T: torch.Tensor, entropy_T: torch.Tensor,
                 chosen_logprobs_Tk: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, SumCount | Max]]:
        algo, mask, teaching = self.algo, batch.loss_mask, self.algo.distillation
        # No old-logprob pass ran, so this is the first update on this batch: old == new, with the gradient stopped.
        old_T = logprobs_T.detach() if batch.old_logprobs is None else batch.old_logprobs
        sequence_ids_T = None
        if algo.needs_whole_sequences:
            sequence_ids_T = packed_sequence_ids(batch.cu_seqlens, batch.num_tokens)
        weights, corrected = self._mismatch_weights(old_T, batch, sequence_ids_T)
        advantages, denominator, distilled = batch.advantages, self._denominator(batch), {}
        if teaching.on and not teaching.top_k:
            advantages, distilled = distilled_advantages(
                advantages, old_T, batch.teacher_logprobs, mask, coef=teaching.coef, task_reward=teaching.task_reward)
        elif not teaching.task_reward:
            advantages = torch.zeros_like(advantages)
        loss, sums = policy_loss(
            logprobs_T, old_T, advantages, mask, config=algo.loss, denominator=denominator,
            surrogate=own_function(algo, "surrogate"), sequence_ids=sequence_ids_T, sentence_ids=batch.sentence_ids,
            ref_logprobs=batch.ref_logprobs, entropy=entropy_T, weights=weights)
        if teaching.top_k:
            dense, distilled = topk_distillation_loss(
                chosen_logprobs_Tk, batch.teacher_logprobs, mask, coef=teaching.coef, denominator=denominator,
                divergence=teaching.divergence)
            loss = loss + dense
        gap_sums, gap_maxima = mismatch_diagnostics(old_T, batch.rollout_logprobs, mask)
        return loss, {**sums, **distilled, **corrected, **gap_sums, "mismatch_max_abs": gap_maxima["mismatch_abs"]}

    def _denominator(self, batch: PackedMicrobatch) -> float | torch.Tensor:
        own = own_function(self.algo, "denominator")
        if own is not None:
            return own(self.totals, batch.response_lengths)
        return self.totals.denominator(self.algo.objective, batch.response_lengths)

    def _mismatch_weights(self, old_T: torch.Tensor, batch: PackedMicrobatch, sequence_ids_T: torch.Tensor | None):
        """(the product of all weights that are switched on, or None; their sums)."""
        algo, given = self.algo, (old_T, batch.rollout_logprobs, batch.loss_mask)
        parts = []
        if algo.mismatch == "tis":
            parts.append(tis_weights(*given, cap=algo.tis_cap))
        elif algo.mismatch == "icepop":
            parts.append(icepop_weights(*given, low=algo.icepop_low, high=algo.icepop_high))
        elif algo.mismatch == "kpop":
            parts.append(kpop_weights(*given, max_kl=algo.kpop_max_kl))
        if algo.sequence_ratio_low is not None:
            parts.append(geometric_mean_mask(*given, sequence_ids_T, low=algo.sequence_ratio_low,
                                             high=algo.sequence_ratio_high))
        if algo.sequence_min_token_ratio is not None:
            parts.append(token_veto_mask(*given, sequence_ids_T, min_ratio=algo.sequence_min_token_ratio))
        if not parts:
            return None, {}
        weights = torch.stack([part for part, _ in parts]).prod(0)
        sums = {key: value for _, part in parts for key, value in part.items()}
        return weights, {**sums, **weight_sums(weights, batch.loss_mask)}
