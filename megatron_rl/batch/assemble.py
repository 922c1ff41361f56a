"""Whole groups in, training samples of each optimiser step out: advantages first, then the budget cut.

Order (spec Sec. 1, Fig. 3): scores -> advantages over all K responses of a group -> the step's responses in the order
of algo.order -> cut at Phi tokens. The cut ends a response's loss mask and its sequence. Attention is causal, so tokens
after the last kept one would change nothing that carries loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from c3po import BudgetSelection, group_advantages, select_within_budget, selection_order
from megatron_rl.batch.fill import BudgetFill
from megatron_rl.batch.hooks import own_advantages
from megatron_rl.config.reward import ShapingConfig
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.types import Rollout, RolloutGroup, TrainSample


class UnfillableStep(ValueError):
    """The step cannot be filled: too few responses could be had. Under dynamic sampling this is how learning ends."""


@dataclass(frozen=True)
class StepBatch:
    """What one optimiser step trains on.

    num_responses counts the responses that the step drew from: its share of the rollout, without those that failed and
    those of groups that were left out.
    """

    samples: tuple[TrainSample, ...]
    selection: BudgetSelection
    num_responses: int
    available_tokens: int

    @property
    def is_full(self) -> bool:
        """Whether it trains on at least Phi tokens."""
        return self.selection.selected_tokens >= self.selection.phi


def assemble(groups: Sequence[RolloutGroup], algo: AlgoConfig, *, dp: int, seed: int, step: int,
             max_response_tokens: int, shaping: Sequence[ShapingConfig] = ()) -> list[StepBatch]:
    """One StepBatch for each optimiser step of this rollout. shaping: reward.shaping.

    The responses are dealt in turn to the optimiser steps, in the order of algo.order: a permutation by (seed, step),
    or as they come, for whole groups whose order was fixed before they were sampled. Each optimiser step then cuts its
    own share at Phi. Objectives other than c3po keep every token. UnfillableStep if underfull=error and Phi is not met.
    """
    fill = BudgetFill(algo, dp, max_response_tokens, tuple(shaping))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards_PK = torch.stack([fill.rewards(group) for group in groups])
    judged_PK = torch.tensor([[not score.failed for score in group.scores] for group in groups])
    if algo.hooks.advantage is None:
        advantages_PK = group_advantages(rewards_PK, judged_PK=judged_PK, scale=algo.advantage_scale)
    else:
        advantages_PK = own_advantages(algo.hooks.advantage, rewards_PK, judged_PK)
    advantages_N = advantages_PK.flatten()
    drawn_P = torch.tensor([fill.is_drawn_from(group.rollouts, group.scores) for group in groups])
    drawn_N = (judged_PK & drawn_P[:, None]).flatten()
    usable_N = torch.tensor([tokens for group in groups
                             for tokens in fill.usable_tokens(group.rollouts, group.scores)])

    teachers = [algo.distillation.place_of(group.prompt.domain) for group in groups for _ in group.rollouts]
    in_order = algo.order == "groups"
    order_N = torch.arange(len(rollouts)) if in_order else selection_order(len(rollouts), seed=seed, step=step)
    batches = []
    for update in range(algo.updates_per_rollout):
        share = order_N[update::algo.updates_per_rollout]
        selection = _select(usable_N[share], algo, fill.phi)
        kept = selection.kept_tokens_N.tolist()
        samples = tuple(sample for index, count in zip(share.tolist(), kept, strict=True)
                        for sample in _samples(index, rollouts[index], count, float(advantages_N[index]),
                                               teachers[index]))
        batches.append(StepBatch(samples, selection, int(drawn_N[share].sum()), int(usable_N[share].sum())))
        if algo.has_budget and algo.underfull == "error" and not batches[-1].is_full:
            raise UnfillableStep(f"step {step}: {selection.selected_tokens} response tokens for algo.phi={fill.phi}; "
                                 "raise rollout.prompts_per_step or set algo.underfull=collect_more")
    return batches


def _select(lengths_N: torch.Tensor, algo: AlgoConfig, phi: int) -> BudgetSelection:
    """The budget cut of one optimiser step over its share of the responses, already in selection order."""
    if not algo.has_budget:
        return BudgetSelection(lengths_N, int(lengths_N.sum()), phi)
    return select_within_budget(lengths_N, torch.arange(len(lengths_N)), phi=phi, cutoff=algo.cutoff)


def _samples(index: int, rollout: Rollout, kept_tokens: int, advantage: float,
             teacher: int) -> Iterator[TrainSample]:
    """The rollout's sequences in their order, up to the last kept response token of all."""
    for sequence in rollout.sequences:
        trainable = np.flatnonzero(sequence.trainable)
        kept = min(kept_tokens, len(trainable))
        if not kept:
            return
        kept_tokens -= kept
        end = int(trainable[kept - 1]) + 1
        yield TrainSample(
            index=index, token_ids=sequence.token_ids[:end], loss_mask=sequence.trainable[:end],
            rollout_logprobs=sequence.rollout_logprobs[:end], advantage=advantage,
            num_response_tokens=rollout.response_tokens,
            routed_experts=None if sequence.routed_experts is None else sequence.routed_experts[:end - 1],
            teacher=teacher,
            teacher_logprobs=None if sequence.teacher_logprobs is None else sequence.teacher_logprobs[:end],
            teacher_ids=None if sequence.teacher_ids is None else sequence.teacher_ids[:end])
