"""Finds the answer that a response puts into \\boxed{...}."""

from __future__ import annotations

import re

__all__ = ["last_boxed"]

_TOKEN = re.compile(r"\\boxed\s*\{|\\.|\{|\}", re.DOTALL)  # each branch begins with a letter: `re` then skips quickly


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
