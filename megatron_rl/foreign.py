"""Code that is not ours, such as a user's reward or environment: how it is found, and what it says of its failure."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

LONGEST_MESSAGE = 500
"""Characters of what code that is not ours says of its failure."""


def load_function(key: str, path: str) -> Callable[..., Any]:
    """What is at the dotted path `package.module.function`, the value of `key`. ValueError if no function is there."""
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{key}={path} must be package.module.function")
    try:
        found = vars(importlib.import_module(module)).get(name)
    except Exception as error:
        raise ValueError(f"{key}={path}: cannot import {module} ({told(error)}); start in the folder that holds it, or "
                         "put that folder on PYTHONPATH") from error
    if found is None:
        raise ValueError(f"{key}={path}: module {module} has no {name}")
    if not callable(found):
        raise ValueError(f"{key}={path} is not a function")
    return found


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
