"""How long the loop collects: until the budget of every step is met, or without one until enough groups train."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from megatron_rl.batch import UnfillableStep
from megatron_rl.config.load import build
from megatron_rl.orchestrator.rollouts import collect_budget
from megatron_rl.rollout.collectors import Ledger
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score


class TwoGroupsARound:
    """Each round gives one group of mixed and one of equal reward: 2 x 2 responses of 5 tokens."""

    def collect(self, round_: int) -> list[RolloutGroup]:
        rollout = Rollout(np.arange(6, dtype=np.int32), np.arange(6) >= 1, np.zeros(6, np.float32), Finish.STOP, ())
        return [RolloutGroup(Prompt("id", (1,), "", "", "math"), (rollout, rollout), ("", ""),
                             (Score(1.0, "correct"), Score(float(right), "correct" if right else "wrong")))
                for right in (False, True)]


def collected(config, source):
    """(groups, batches) of step 0; the account of all rounds adds up."""

    async def collect(round_: int):
        return source.collect(round_), Ledger(generated_tokens=7)

    groups, batches, ledger, count = asyncio.run(collect_budget(config, collect, 0))
    assert ledger.generated_tokens == 7 * count
    return groups, batches


def rounds(**algo) -> tuple[int, int]:
    """(rounds collected, tokens selected) with 2 prompts a step."""
    config = build({"algo": algo, "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2}})
    groups, [batch] = collected(config, TwoGroupsARound())
    return len(groups) // 2, batch.selection.selected_tokens


@pytest.mark.parametrize(("algo", "expected"), [
    ({"phi": 20}, (1, 20)),
    ({"phi": 21}, (2, 21)),
    ({"phi": 20, "dynamic_sampling": True}, (2, 20)),  # 10 tokens a round are of mixed reward
    ({"objective": "token_mean"}, (1, 20)),
    ({"objective": "token_mean", "dynamic_sampling": True}, (2, 20)),  # 2 mixed groups, as many as prompts
    ({"objective": "token_mean", "dynamic_sampling": True, "underfull": "train_short"}, (1, 10)),
])
def test_rounds(algo, expected):
    assert rounds(**algo) == expected


def test_too_few_mixed_groups_are_named():
    with pytest.raises(UnfillableStep, match=r"only 2 of 4 responses in mixed groups after "
                                         r"algo\.max_collect_rounds=1 rounds"):
        rounds(objective="grpo", dynamic_sampling=True, max_collect_rounds=1)


class OneGroupARound(TwoGroupsARound):
    """A collector that carries unfinished responses on hands out fewer groups than prompts."""

    def collect(self, round_: int) -> list[RolloutGroup]:
        return super().collect(round_)[:1]


def test_without_budget_and_dynamic_sampling_one_round_is_enough():
    config = build({"algo": {"objective": "grpo"}, "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2}})
    assert len(collected(config, OneGroupARound())[0]) == 1


class NothingAtFirst(TwoGroupsARound):
    """A budget of sampled tokens may end before the first group has finished."""

    def collect(self, round_: int) -> list[RolloutGroup]:
        return super().collect(round_) if round_ else []


@pytest.mark.parametrize("underfull", ["collect_more", "train_short"])
def test_a_round_without_a_group_is_followed_by_another(underfull):
    config = build({"algo": {"phi": 20, "underfull": underfull},
                    "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2}})
    groups, [batch] = collected(config, NothingAtFirst())
    assert (len(groups), batch.selection.selected_tokens) == (2, 20)


def test_rounds_that_give_nothing_at_all_are_an_error():
    config = build({"algo": {"phi": 20, "max_collect_rounds": 1}})
    with pytest.raises(UnfillableStep, match=r"step 0: 0 response tokens after algo\.max_collect_rounds=1 rounds, 20"):
        collected(config, NothingAtFirst())


class ThreeResponsesARound:
    """One group of three responses of 5 tokens: dealt to two optimiser steps, 10 tokens and 5."""

    def collect(self, round_: int) -> list[RolloutGroup]:
        rollout = Rollout(np.arange(6, dtype=np.int32), np.arange(6) >= 1, np.zeros(6, np.float32), Finish.STOP, ())
        scores = tuple(Score(value, "correct") for value in (1.0, 0.0, 0.0))
        return [RolloutGroup(Prompt("id", (1,), "", "", "math"), (rollout,) * 3, ("",) * 3, scores)]


def test_every_optimiser_step_of_a_rollout_must_be_full():
    config = build({"algo": {"phi": 6, "updates_per_rollout": 2}})
    groups, batches = collected(config, ThreeResponsesARound())
    assert len(groups) == 2 and [batch.selection.selected_tokens for batch in batches] == [6, 6]
