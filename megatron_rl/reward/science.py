"""Answers of science problems: as in mathematics, and measured numbers within a tolerance, with units (pint 0.26.2)."""

from __future__ import annotations

from megatron_rl.reward.answer.read import Rules
from megatron_rl.reward.base import Job, needs_answer, run
from megatron_rl.reward.math import MathVerifyScorer, judge, prepared
from megatron_rl.types import Prompt, Score

__all__ = ["ScienceScorer", "judge_science"]


class ScienceScorer:
    """1 if the last \\boxed{...} is prompt.answer.

    A measured number must lie within `relative_tolerance`, in a unit of the same kind (5 km is 5000 m). Everything else
    is compared as MathVerifyScorer does. A reference that is a whole number without a unit is a count and must be met
    exactly. If the reference has no unit, the answer's unit is ignored. If it has one, an answer without a unit is
    wrong. The prompt's metadata may hold its own `tolerance`.
    """

    preload = MathVerifyScorer.preload

    def __init__(self, relative_tolerance: float):
        self._tolerance = relative_tolerance

    @staticmethod
    def warm_up() -> None:
        MathVerifyScorer.warm_up()
        judge_science("1 km", "1000 m", 0.01)

    def prepare(self, prompt: Prompt, response_text: str) -> Score | Job:
        return prepared(prompt, response_text, Rules(float(prompt.metadata.get("tolerance", self._tolerance))))

    def check(self, prompt: Prompt) -> None:
        """Also refuses a tolerance that is not a number."""
        needs_answer(prompt)
        tolerance = prompt.metadata.get("tolerance", self._tolerance)
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
            raise ValueError(f"prompt {prompt.id}: tolerance={tolerance!r} must be a number from 0 to 1")

    def score(self, prompt: Prompt, response_text: str) -> Score:
        return run(self.prepare(prompt, response_text))


def judge_science(box: str, answer: str, tolerance: float) -> Score:
    """Whether two LaTeX answers are the same quantity, formula or words. No time limit."""
    return judge(box, answer, Rules(tolerance), "")
