"""Whole groups in, the training samples of one optimiser step out: advantages first, then the budget cut.

Order (spec Sec. 1, Fig. 3): scores -> advantages over all K responses of a group -> permutation of the step's
responses -> cut at Phi tokens. The cut ends a response's loss mask and its sequence: under causal attention
what follows the last kept token changes nothing that carries loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from c3po import (
    BudgetSelection,
    group_advantages,
    select_within_budget,
    selection_order,
    soft_overlong_penalty,
    truncation_keep_mask,
)
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.types import Finish, RolloutGroup, TrainSample


@dataclass(frozen=True)
class StepBatch:
    """What one optimiser step trains on. num_responses counts the responses that its budget drew from."""

    samples: tuple[TrainSample, ...]
    selection: BudgetSelection
    num_responses: int
    available_tokens: int


def step_budget(algo: AlgoConfig, dp: int) -> int:
    """Response tokens that one rollout must supply: Phi for each of its optimiser steps."""
    return algo.phi_global(dp) * algo.updates_per_rollout


def assemble(groups: Sequence[RolloutGroup], algo: AlgoConfig, *, dp: int, seed: int, step: int,
             max_response_tokens: int) -> list[StepBatch]:
    """One StepBatch per optimiser step of this rollout; identical on every rank.

    The responses, permuted by (seed, step), are dealt to the optimiser steps in turn, and each step cuts its own
    share at Phi. `objective: grpo` keeps every token (Eq. 1). With dynamic_sampling a group of equal rewards, whose
    advantages are all zero, offers no token to the budget (DAPO, arXiv 2503.14476, Eq. 11).
    ValueError when underfull=error and Phi is not met.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths_N = torch.tensor([rollout.response_tokens for rollout in rollouts])
    truncated_N = torch.tensor([rollout.finish is Finish.LENGTH for rollout in rollouts])
    rewards_PK = torch.tensor([[score.value for score in group.scores] for group in groups], dtype=torch.float32)
    if algo.truncated == "overlong_penalty":
        rewards_PK = rewards_PK + soft_overlong_penalty(
            lengths_N, max_response_tokens=max_response_tokens,
            buffer_tokens=algo.overlong_buffer_tokens).view_as(rewards_PK)
    advantages_N = group_advantages(rewards_PK, scale=algo.advantage_scale).flatten()
    usable_N = torch.where(truncation_keep_mask(truncated_N, algo.truncated), lengths_N, 0)
    if algo.dynamic_sampling:
        mixed_P = rewards_PK.amax(1) > rewards_PK.amin(1)
        usable_N = torch.where(mixed_P.repeat_interleave(rewards_PK.shape[1]), usable_N, 0)

    order_N = selection_order(len(rollouts), seed=seed, step=step)
    phi = algo.phi_global(dp)
    batches = []
    for update in range(algo.updates_per_rollout):
        share = order_N[update::algo.updates_per_rollout]
        selection = _select(usable_N[share], algo, phi)
        if algo.objective == "c3po" and algo.underfull == "error" and selection.selected_tokens < phi:
            raise ValueError(f"step {step}: {selection.selected_tokens} response tokens for c3po.phi={phi}; raise "
                             "rollout.prompts_per_step or set c3po.underfull=collect_more")
        kept = selection.kept_tokens_N.tolist()
        samples = tuple(_sample(int(index), rollouts[index], count, float(advantages_N[index]))
                        for index, count in zip(share.tolist(), kept, strict=True) if count)
        batches.append(StepBatch(samples, selection, len(share), int(usable_N[share].sum())))
    return batches


def _select(lengths_N: torch.Tensor, algo: AlgoConfig, phi: int) -> BudgetSelection:
    """The budget cut of one optimiser step over its share of the responses, already in selection order."""
    if algo.objective == "grpo":
        return BudgetSelection(lengths_N, int(lengths_N.sum()), phi)
    return select_within_budget(lengths_N, torch.arange(len(lengths_N)), phi=phi, cutoff=algo.cutoff)


def _sample(index: int, rollout, kept_tokens: int, advantage: float) -> TrainSample:
    """The rollout up to its last kept response token."""
    trainable = np.flatnonzero(rollout.trainable)
    end = int(trainable[kept_tokens - 1]) + 1
    return TrainSample(
        index=index, token_ids=rollout.token_ids[:end], loss_mask=rollout.trainable[:end],
        rollout_logprobs=rollout.rollout_logprobs[:end], advantage=advantage,
        num_response_tokens=len(trainable),
        routed_experts=None if rollout.routed_experts is None else rollout.routed_experts[:end - 1])
