"""Mathematical answers: Math-Verify 0.9.0 on the last \\boxed{...} against the reference answer.

Math-Verify's own time limits use signal.alarm, which only works on a main thread (parser.py `parse`,
grader.py `verify`), so they are off here and RewardPool kills a worker that takes too long.
"""

from __future__ import annotations

import logging
import re

from megatron_rl.reward.base import Job, run, verdict
from megatron_rl.reward.boxed import last_boxed
from megatron_rl.types import Prompt, Score

__all__ = ["MathVerifyScorer", "judge_math"]

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


class MathVerifyScorer:
    """1 if the boxed expression equals prompt.answer, else 0; no_answer without a closed, non-empty box."""

    preload = ("math_verify",)

    @staticmethod
    def warm_up() -> None:
        """Grammar, number and symbol paths are set up at their first use: not at the first response's cost."""
        logging.getLogger("math_verify").setLevel(logging.CRITICAL + 1)
        for box, answer in (("0.5", "\\frac{1}{2}"), ("6+3x", "3*x+6"), ("(x+1)^2", "x^2+2x+1")):
            judge_math(box, answer)

    def prepare(self, prompt: Prompt, response_text: str) -> Score | Job:
        box = (last_boxed(response_text) or "").rstrip(" .")  # "\\boxed{\\frac{1}{2}.}" does not parse
        if not box:
            return Score(0.0, "no_answer")
        answer = prompt.answer.strip()
        if box == answer:
            return verdict(True)
        if _INTEGER.fullmatch(box) and _INTEGER.fullmatch(answer):
            return verdict(int(box) == int(answer))
        return Job(judge_math, (box, answer), ("math_verify", box, answer))

    def score(self, prompt: Prompt, response_text: str) -> Score:
        return run(self.prepare(prompt, response_text))


def judge_math(box: str, answer: str) -> Score:
    """Whether two LaTeX expressions are equal. No time limit: 9^9^9^9 takes minutes."""
    from math_verify import parse, verify  # here, because only workers need sympy

    gold, found = (parse(f"${expression}$", parsing_timeout=None) for expression in (answer, box))
    return verdict(bool(verify(gold, found, timeout_seconds=None)))
