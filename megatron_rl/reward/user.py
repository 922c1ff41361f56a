"""A user's own reward function: `function(prompt, response_text) -> float | Score`, by dotted path."""

from __future__ import annotations

import functools
import math
from typing import Any, SupportsFloat

from megatron_rl.foreign import LONGEST_MESSAGE, as_utf8, load_function
from megatron_rl.reward.base import STATUSES, Job, run
from megatron_rl.types import Prompt, Score

__all__ = ["UserScorer", "judge_user", "score_of"]

LARGEST_REWARD = 1e15
"""Rewards are float32, and the deviation of a group squares and adds them: what is larger could overflow there."""


class UserScorer:
    """Calls `module.function` in a worker. score_of judges a number alone. Never remembered, because it may be random.

    ValueError naming reward.routes.<domain> if the path cannot be imported or is not callable.
    """

    def __init__(self, domain: str, path: str, correct_from: float | None):
        load_function(f"reward.routes.{domain}", path)
        self.preload = (path.rpartition(".")[0],)
        self.warm_up = functools.partial(_warm_up, path)
        self._path, self._correct_from = path, correct_from

    def prepare(self, prompt: Prompt, response_text: str) -> Job:
        return Job(judge_user, (self._path, prompt, response_text, self._correct_from), memo_key=None)

    def check(self, prompt: Prompt) -> None:
        """Checks nothing: only the function knows what it needs."""

    def score(self, prompt: Prompt, response_text: str) -> Score:
        return run(self.prepare(prompt, response_text))


def judge_user(path: str, prompt: Prompt, response_text: str, correct_from: float | None) -> Score:
    """The function's Score, its value a plain float. ValueError if it returns no number up to LARGEST_REWARD and no
    valid Score."""
    result = load_function("reward.routes", path)(prompt, response_text)
    score = result if isinstance(result, Score) else None
    value = _number(result if score is None else score.value)
    if value is None or (score is not None and (score.status not in STATUSES or not isinstance(score.detail, str))):
        raise ValueError(f"{path} returned {_clipped(repr(result))}: not a number between -{LARGEST_REWARD:g} and "
                         f"{LARGEST_REWARD:g}, nor a Score with a status of {STATUSES}")
    if score is None:
        return score_of(value, correct_from)
    return Score(value, score.status, _clipped(score.detail), None if score.correct is None else bool(score.correct))


def _clipped(text: str) -> str:
    return as_utf8(text[:LONGEST_MESSAGE])


def _number(result: Any) -> float | None:
    """A float from anything that is one number: truth values, and numpy's or torch's numbers too.

    None for the rest, and for numbers beyond LARGEST_REWARD.
    """
    try:
        value = float(result) if isinstance(result, SupportsFloat) else math.nan
    except (TypeError, ValueError, OverflowError):  # an array of several; an integer beyond all floats
        return None
    return value if abs(value) <= LARGEST_REWARD else None


def score_of(reward: float, correct_from: float | None) -> Score:
    """The Score of a number alone (reward.correct_from): right from correct_from on, wrong at 0 and below, graded in
    between. Without correct_from every number is graded, and nobody can say what is right."""
    if correct_from is None:
        return Score(reward, "graded")
    if reward >= correct_from:
        return Score(reward, "correct")
    return Score(reward, "wrong") if reward <= 0 else Score(reward, "graded", correct=False)


def _warm_up(path: str) -> None:
    load_function("reward.routes", path)
