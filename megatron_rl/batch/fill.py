"""How many tokens a response offers to the training budget, and how many groups fill it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from c3po import soft_overlong_penalty
from megatron_rl.batch.hooks import keeps_group
from megatron_rl.batch.shaping import shaped
from megatron_rl.config.reward import ShapingConfig
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.observe.verdicts import is_mixed
from megatron_rl.types import Finish, Rollout, RolloutGroup, Score


@dataclass(frozen=True)
class BudgetFill:
    """The budget of a step and its rules: for one response, for a whole group, and for groups that come in one by one.

    Within a step this is the only reader of algo.phi.
    """

    algo: AlgoConfig
    dp: int
    max_response_tokens: int
    shaping: tuple[ShapingConfig, ...] = ()

    @property
    def phi(self) -> int:
        """Response tokens that one optimiser step trains on, over all ranks."""
        return self.algo.phi_global(self.dp)

    @property
    def tokens(self) -> int:
        """Response tokens that one rollout must supply: Phi for each of its optimiser steps."""
        return self.phi * self.algo.updates_per_rollout

    def rewards(self, group: RolloutGroup) -> torch.Tensor:
        """The rewards of a group's responses after shaping, float32 [K]: their scores and all terms of `shaped`."""
        return sum(self.shaped(group).values(), torch.tensor([float(score.value) for score in group.scores]))

    def shaped(self, group: RolloutGroup) -> dict[str, torch.Tensor]:
        """What is added to the rewards, by term, each float32 [K]: reward.shaping's, and the over-long penalty."""
        overlong = {"overlong": self.penalties(group.rollouts)} if self.algo.truncated == "overlong_penalty" else {}
        return {**overlong, **shaped(group, self.shaping)}

    def penalties(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """The over-long penalty of each response, float32 [K]; zeros unless truncated=overlong_penalty.

        It counts the tokens that the limit counts: all after the prompt, sampled or given by an environment.
        """
        if self.algo.truncated != "overlong_penalty":
            return torch.zeros(len(rollouts))
        return soft_overlong_penalty(
            torch.tensor([rollout.tokens_after_prompt for rollout in rollouts]),
            max_response_tokens=self.max_response_tokens, buffer_tokens=self.algo.overlong_buffer_tokens)

    def is_drawn_from(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> bool:
        """False for a group that dynamic_sampling leaves out (all right or all wrong; shaping does not matter), or
        algo.hooks.group_filter."""
        if self.algo.dynamic_sampling and not is_mixed(scores):
            return False
        path = self.algo.hooks.group_filter
        return path is None or keeps_group(path, rollouts, scores)

    def offered(self, rollout: Rollout, score: Score) -> int:
        """Tokens that one response offers: none if it failed, or if it was truncated and truncated=mask."""
        if score.failed or (rollout.finish is Finish.LENGTH and self.algo.truncated == "mask"):
            return 0
        return rollout.response_tokens

    def usable_tokens(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> list[int]:
        """Tokens that each response of a whole group offers.

        A group that is left out offers none (for dynamic_sampling: DAPO, arXiv 2503.14476, Eq. 11).
        """
        if not self.is_drawn_from(rollouts, scores):
            return [0] * len(rollouts)
        return [self.offered(rollout, score) for rollout, score in zip(rollouts, scores, strict=True)]

    def count(self, responses_per_prompt: int) -> FillCount:
        return FillCount(self, responses_per_prompt)


class FillCount:
    """Which leading groups fill the budget while their responses are judged one by one.

    An unfinished response offers nothing yet, so `needed` can only shrink. If whole groups may be left out, a group
    offers nothing until all K responses are judged. A call costs O(1) until the budget is full, and then one
    cumulative sum.
    """

    def __init__(self, fill: BudgetFill, responses_per_prompt: int):
        self._fill, self._k = fill, responses_per_prompt
        self._phi = fill.phi
        self._updates = fill.algo.updates_per_rollout
        self._judged: list[dict[int, tuple[Rollout, Score]]] = []
        self._offered_N = np.zeros(0, dtype=np.int64)
        self.total = 0

    @property
    def groups(self) -> int:
        return len(self._judged)

    def open(self) -> int:
        """The place of one more group, which comes after all others in the order of the cut."""
        self._judged.append({})
        if self.groups * self._k > len(self._offered_N):
            self._offered_N = np.concatenate([self._offered_N, np.zeros(max(self._k, len(self._offered_N)), np.int64)])
        return self.groups - 1

    def judged(self, place: int, sample: int, rollout: Rollout, score: Score) -> None:
        """Response `sample` of the group at `place` has been judged."""
        if not self._fill.algo.leaves_groups_out:
            self._offer(place, sample, self._fill.offered(rollout, score))
            return
        group = self._judged[place]
        group[sample] = (rollout, score)
        if len(group) == self._k:
            whole = [group[each] for each in range(self._k)]
            for each, tokens in enumerate(self._fill.usable_tokens(*zip(*whole, strict=True))):
                self._offer(place, each, tokens)

    def _offer(self, place: int, sample: int, tokens: int) -> None:
        self._offered_N[place * self._k + sample] = tokens
        self.total += tokens

    def needed(self) -> int | None:
        """How many leading groups give each optimiser step its Phi under order=groups. None: all of them are too few.

        As in assemble, response i of the sequence goes to optimiser step i modulo updates_per_rollout.
        """
        if self.total < self._phi * self._updates:
            return None
        offered_N, needed = self._offered_N[:self.groups * self._k], 0
        for update in range(self._updates):
            reached = np.cumsum(offered_N[update::self._updates])
            full = int(np.searchsorted(reached, self._phi))
            if full == len(reached):
                return None
            needed = max(needed, (update + full * self._updates) // self._k + 1)
        return needed

    def mean_offered(self, first: int, end: int) -> float:
        """Tokens that a response of the groups at places first .. end - 1 offers, on average."""
        return float(self._offered_N[first * self._k:end * self._k].mean())
