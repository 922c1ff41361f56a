"""How a key is checked."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """ValueError with `message`, which names the dotted key and says what to do."""
    if not condition:
        raise ValueError(message)
