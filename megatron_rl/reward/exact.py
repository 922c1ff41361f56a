"""Answers that are one fixed string, such as the number at the end of a line of arithmetic."""

from __future__ import annotations

from megatron_rl.reward.base import needs_answer, verdict
from megatron_rl.types import Prompt, Score

__all__ = ["ExactScorer"]


class ExactScorer:
    """1 if the stripped response, or its first line, is prompt.answer; no_answer if it is blank."""

    preload = ()
    warm_up = None

    def prepare(self, prompt: Prompt, response_text: str) -> Score:
        text = response_text.strip()
        if not text:
            return Score(0.0, "no_answer")
        first_line = text.splitlines()[0].rstrip()
        return verdict(prompt.answer.strip() in (text, first_line))

    def check(self, prompt: Prompt) -> None:
        needs_answer(prompt)

    def score(self, prompt: Prompt, response_text: str) -> Score:
        return self.prepare(prompt, response_text)
