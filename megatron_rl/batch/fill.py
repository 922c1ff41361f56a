"""How many tokens a response offers to the training budget, and how many groups fill it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from c3po import soft_overlong_penalty, truncation_keep_mask
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.observe.verdicts import is_mixed
from megatron_rl.types import Finish, Rollout, Score


def step_budget(algo: AlgoConfig, dp: int) -> int:
    """Response tokens that one rollout must supply: Phi for each of its optimiser steps."""
    return algo.phi_global(dp) * algo.updates_per_rollout


@dataclass(frozen=True)
class BudgetFill:
    """The rules of the budget for groups that come in one by one and for groups that are not whole yet."""

    algo: AlgoConfig
    dp: int
    max_response_tokens: int

    @property
    def tokens(self) -> int:
        return step_budget(self.algo, self.dp)

    def rewards(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> torch.Tensor:
        """What a group's responses are worth after shaping, float32 [K]: their scores and the over-long penalty."""
        return torch.tensor([score.value for score in scores], dtype=torch.float32) + self.penalties(rollouts)

    def penalties(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """The over-long penalty of each response, float32 [K]; zeros unless truncated=overlong_penalty.

        It counts the tokens that the limit counts: all after the prompt, sampled or given by an environment.
        """
        if self.algo.truncated != "overlong_penalty":
            return torch.zeros(len(rollouts))
        return soft_overlong_penalty(
            torch.tensor([rollout.tokens_after_prompt for rollout in rollouts]),
            max_response_tokens=self.max_response_tokens, buffer_tokens=self.algo.overlong_buffer_tokens)

    def is_drawn_from(self, scores: Sequence[Score]) -> bool:
        """False for a group that dynamic_sampling leaves out: all right or all wrong, whatever shaping makes of it."""
        return not self.algo.dynamic_sampling or is_mixed(scores)

    def usable_tokens(self, judged: Sequence[tuple[Rollout, Score] | None]) -> list[int]:
        """Tokens that each response of a group offers, 0 while it is not judged (None).

        With dynamic_sampling a group that is not mixed offers none (DAPO, arXiv 2503.14476, Eq. 11), and none as
        long as it is not whole.
        """
        if self.algo.dynamic_sampling:
            if None in judged:
                return [0] * len(judged)
            if not self.is_drawn_from([score for _, score in judged]):
                return [0] * len(judged)
        return [0 if each is None else self._usable(each[0]) for each in judged]

    def _usable(self, rollout: Rollout) -> int:
        truncated = torch.tensor([rollout.finish is Finish.LENGTH])
        return rollout.response_tokens if truncation_keep_mask(truncated, self.algo.truncated) else 0

    def groups_needed(self, usable_tokens: Sequence[Sequence[int]]) -> int | None:
        """How many leading groups give each optimiser step its Phi under order=groups; None: all are too few.

        usable_tokens [P][K]. As in assemble, response i of the sequence goes to optimiser step i modulo
        updates_per_rollout.
        """
        updates = self.algo.updates_per_rollout
        group_of = [place for place, group in enumerate(usable_tokens) for _ in group]
        flat = list(itertools.chain.from_iterable(usable_tokens))
        needed = 0
        for update in range(updates):
            reached = itertools.accumulate(flat[update::updates])
            full = next((i for i, tokens in enumerate(reached) if tokens >= self.algo.phi_global(self.dp)), None)
            if full is None:
                return None
            needed = max(needed, group_of[update + full * updates] + 1)
        return needed
