"""How long the loop collects: until the budget of every step is met, or without one until enough groups train."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rl.config.load import load
from megatron_rl.loop import collect_budget
from megatron_rl.observe.timing import Timers
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score


class TwoGroupsARound:
    """Each round gives one group of mixed and one of equal reward: 2 x 2 responses of 5 tokens."""

    def collect(self, step: int, round_: int) -> list[RolloutGroup]:
        rollout = Rollout(np.arange(6, dtype=np.int32), np.arange(6) >= 1, np.zeros(6, np.float32), Finish.STOP, ())
        return [RolloutGroup(Prompt("id", (1,), "", "", "math"), (rollout, rollout), ("", ""),
                             (Score(1.0, "correct"), Score(low, "wrong"))) for low in (0.0, 1.0)]


def rounds(*overrides: str) -> tuple[int, int]:
    """(rounds collected, tokens selected) with 2 prompts a step."""
    config = load(["rollout.prompts_per_step=2", "rollout.responses_per_prompt=2", *overrides])
    groups, [batch] = collect_budget(config, TwoGroupsARound(), 0, Timers())
    return len(groups) // 2, batch.selection.selected_tokens


@pytest.mark.parametrize(("overrides", "expected"), [
    (["c3po.phi=20"], (1, 20)),
    (["c3po.phi=21"], (2, 21)),
    (["c3po.phi=20", "c3po.dynamic_sampling=true"], (2, 20)),  # 10 tokens a round are of mixed reward
    (["c3po.objective=token_mean"], (1, 20)),
    (["c3po.objective=token_mean", "c3po.dynamic_sampling=true"], (2, 20)),  # 2 mixed groups, as many as prompts
    (["c3po.objective=token_mean", "c3po.dynamic_sampling=true", "c3po.underfull=train_short"], (1, 10)),
])
def test_rounds(overrides, expected):
    assert rounds(*overrides) == expected


def test_too_few_mixed_groups_are_named():
    with pytest.raises(ValueError, match=r"only 2 of 4 responses in groups of mixed reward after "
                                         r"c3po\.max_collect_rounds=1 rounds"):
        rounds("c3po.objective=grpo", "c3po.dynamic_sampling=true", "c3po.max_collect_rounds=1")
