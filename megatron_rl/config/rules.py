"""How a key is checked."""

from __future__ import annotations

import re

_WRITTEN_BREAK = re.compile(r"\\n(?![a-z])")  # but not \nabla


def require(condition: bool, message: str) -> None:
    """ValueError with `message`, which names the dotted key and says what to do."""
    if not condition:
        raise ValueError(message)


def require_pattern(key: str, pattern: str) -> None:
    """ValueError unless `pattern` is a regular expression of Python's re."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}={pattern!r} is no regular expression of Python's re: {error}") from error


def require_real_breaks(key: str, text: str) -> None:
    """ValueError when `text` holds a backslash and an n where a line break was meant, as in a shell's plain quotes."""
    require(_WRITTEN_BREAK.search(text) is None,
            f"{key}={text!r} holds a backslash and an n, not a line break: in a shell write $'{key}=\"...\\n...\"', "
            "with the dollar, or set it in a YAML file")
