"""Mathematical answers: what stands in the last \\boxed{...}, against the reference (reward/answer/).

There is no time limit here, and 9^9^9^9 takes minutes: RewardPool kills a worker that takes too long.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace

from megatron_rl.reward.answer.compare import BREAKS, same
from megatron_rl.reward.answer.copies import is_copy
from megatron_rl.reward.answer.latex import Unreadable, undress
from megatron_rl.reward.answer.read import Rules, has_unit, is_undone, read, read_reference
from megatron_rl.reward.answer.words import final_letter, is_choice, same_words
from megatron_rl.reward.base import Job, needs_answer, run, verdict
from megatron_rl.reward.boxed import answer_part, last_boxed
from megatron_rl.types import Prompt, Score

__all__ = ["MathVerifyScorer", "judge", "judge_math", "prepared"]

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_EXACT = Rules()


class MathVerifyScorer:
    """1 if the last box holds prompt.answer, worked out; docs/rewards.md says what counts as equal and as worked out.

    no_answer without a closed, non-empty box behind the thinking. If the reference is an option's letter, the last line
    will do.
    """

    preload = ("math_verify", "mpmath", "pint")

    @staticmethod
    def warm_up() -> None:
        """Sets up the paths for numbers, units and symbols, so that the first response does not pay for it."""
        logging.getLogger("math_verify").setLevel(logging.CRITICAL + 1)
        for box, answer in (("0.5", "\\frac{1}{2}"), ("(x+1)^2", "x^2+2x+1"), ("5\\text{ cm}", "50\\text{ mm}"),
                            ("\\sum_{k=1}^n k", "\\sum_{k=1}^{n} k")):
            judge_math(box, answer)

    def prepare(self, prompt: Prompt, response_text: str) -> Score | Job:
        text, answer = answer_part(response_text, prompt.text), prompt.answer.strip()
        box = last_boxed(text)
        if box is not None and _INTEGER.fullmatch(box) and _INTEGER.fullmatch(answer):
            return verdict(int(box) == int(answer))
        return _prepared(prompt, text, box, _EXACT)

    def check(self, prompt: Prompt) -> None:
        needs_answer(prompt)

    def score(self, prompt: Prompt, response_text: str) -> Score:
        return run(self.prepare(prompt, response_text))


def prepared(prompt: Prompt, response_text: str, rules: Rules) -> Score | Job:
    """The verdict if it needs no worker, else the job that finds it."""
    text = answer_part(response_text, prompt.text)
    return _prepared(prompt, text, last_boxed(text), rules)


def _prepared(prompt: Prompt, text: str, box: str | None, rules: Rules) -> Score | Job:
    answer = prompt.answer.strip()
    if box is None and is_choice(answer):
        letter = final_letter(text)
        return Score(0.0, "no_answer") if letter is None else verdict(letter == answer.strip("()"))
    box = (box or "").rstrip(" .")
    if not box:
        return Score(0.0, "no_answer")
    if box == answer and not is_undone(answer):
        return verdict(True)
    return Job(judge, (box, answer, rules, prompt.text), ("answer", box, answer, rules, prompt.text))


def judge_math(box: str, answer: str) -> Score:
    """Whether two LaTeX answers are the same, numbers exactly. No time limit."""
    return judge(box, answer, _EXACT, "")


def judge(box: str, answer: str, rules: Rules, question: str) -> Score:
    """Whether a box holds the answer and does not just repeat the question.

    `wrong` with a detail if no answer could be right. An answer that breaks the arithmetic is wrong too: it is the
    response's fault, and not the scorer's. No time limit.
    """
    try:
        wanted = read_reference(answer, rules)
    except Unreadable as reason:
        return Score(0.0, "wrong", f"no answer meets the reference: {reason}")
    try:
        if is_choice(undress(answer)):
            return verdict(same_words(undress(box), undress(answer)))
        found = read(box, rules)
        if has_unit(wanted):
            found += read(box, replace(rules, letters=True))
        elif has_unit(found):
            wanted += read(answer, replace(rules, letters=True))
        return verdict(same(found, wanted, rules) and not is_copy(box, found, wanted, question))
    except BREAKS:
        return verdict(False)
