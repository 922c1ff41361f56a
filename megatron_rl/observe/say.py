"""One line for whoever sits at the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

__all__ = ["say", "warn"]


def say(text: str) -> None:
    """Prints the text as it is: broken between words on a terminal, in one line anywhere else."""
    _print(Console(), text)


def warn(text: str) -> None:
    """As `say`, on standard error and with the program's name."""
    _print(Console(stderr=True), f"megatron-rl: {text}")


def _print(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=not console.is_terminal)
