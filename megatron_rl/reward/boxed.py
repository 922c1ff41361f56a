"""Finds the part of a response that answers, and what it puts into \\boxed{...}."""

from __future__ import annotations

import re

from megatron_rl.config.reward import THINKING_BEGIN, THINKING_END

__all__ = ["answer_part", "last_boxed", "with_thinking"]

_TOKEN = re.compile(r"\\boxed\s*\{|\\.|\{|\}", re.DOTALL)  # each branch begins with a letter: `re` then skips quickly


def with_thinking(text: str, prompt_text: str) -> str:
    """The response, with the <think> that a chat template has put at the prompt's end."""
    return f"{THINKING_BEGIN}\n{text}" if prompt_text.rstrip().endswith(THINKING_BEGIN) else text


def answer_part(text: str, prompt_text: str = "") -> str:
    """What follows the first </think>, or the whole text; nothing if the thinking has begun and does not end."""
    _, end, after = text.partition(THINKING_END)
    if end:
        return after
    return "" if with_thinking(text, prompt_text).lstrip().startswith(THINKING_BEGIN) else text


def last_boxed(text: str) -> str | None:
    """The content of the \\boxed{...} that opens last among those that close; None if there is none.

    Braces nest, and escaped braces do not count. A text full of open boxes costs two passes and no more.
    """
    last = text.rfind("\\boxed")
    if last < 0:
        return None
    escapes = last - len(text[:last].rstrip("\\"))  # an even number: this backslash begins a token
    if escapes % 2 == 0 and (found := _last_boxed(text[last:])) is not None:
        return found
    return _last_boxed(text)


def _last_boxed(text: str) -> str | None:
    open_at: list[int | None] = []  # start of the content for a box, None for a plain brace
    best: tuple[int, int] | None = None
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "}":
            start = open_at.pop() if open_at else None
            if start is not None and (best is None or start > best[0]):
                best = start, match.start()
        elif token == "{":
            open_at.append(None)
        elif token.startswith("\\boxed"):
            open_at.append(match.end())
    return None if best is None else text[best[0]:best[1]].strip()
