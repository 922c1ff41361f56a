"""What code that is not ours, such as a user's reward or environment, says of its failure."""

from __future__ import annotations

LONGEST_MESSAGE = 500
"""Characters of what code that is not ours says of its failure."""


def told(error: BaseException) -> str:
    """`Type: message` of an error that was raised by code that is not ours: short, printable and UTF-8."""
    try:
        message = str(error)
    except Exception as other:  # noqa: BLE001 -- it is the user's code that raises, as before
        message = f"its message could not be had ({type(other).__name__})"
    return as_utf8(f"{type(error).__name__}: {message[:LONGEST_MESSAGE]}")


def as_utf8(text: str) -> str:
    """The text, with escapes for what UTF-8 cannot say."""
    return text.encode(errors="backslashreplace").decode()
