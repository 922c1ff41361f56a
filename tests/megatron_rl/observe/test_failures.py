"""How many failed responses a step bears, and what is said about them."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from megatron_rl.observe.failures import TooManyFailures, bear_failures
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score

ROLLOUT = Rollout(np.zeros(2, np.int32), np.array([False, True]), np.zeros(2, np.float32), Finish.STOP, ())
RIGHT = Score(1.0, "correct")


def group(*scores: Score) -> RolloutGroup:
    return RolloutGroup(Prompt("p", (1,), "", "", "math"), (ROLLOUT,) * len(scores), ("",) * len(scores), scores)


STEP = [group(Score(0.0, "error", "first"), RIGHT, Score(0.0, "engine_error", "gone"), RIGHT),
        group(Score(0.0, "error", "second"), Score(0.0, "wrong"), Score(0.0, "timeout"), RIGHT)]


def test_a_share_at_the_limit_is_borne_and_said(caplog, messages):
    with caplog.at_level(logging.WARNING):
        bear_failures(STEP, what="step 3", max_fraction=3 / 8)
    assert messages() == ["step 3: 3 of 8 responses failed and train nothing: 1 x engine_error (gone); "
                               "2 x error (first)"]


def test_a_larger_share_ends_the_run_and_names_the_key():
    with pytest.raises(TooManyFailures, match=r"3 of 8 responses failed .*2 x error \(first\)\. That is more than "
                                              r"rollout\.max_failed_fraction=0\.37 allows"):
        bear_failures(STEP, what="step 3", max_fraction=0.37)


def test_wrong_answers_are_no_failures(messages):
    bear_failures([group(Score(0.0, "wrong"), Score(0.0, "timeout"))], what="step 0", max_fraction=0.0)
    assert not messages()
