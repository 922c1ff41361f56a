"""When two outputs of a program, or two values of a function, count as the same."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["same_output", "same_value"]

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][+-]?\d+)([eE][+-]?\d+)?")


def same_output(found: str, expected: str, tolerance: float) -> bool:
    """Word by word, whatever the white space. Where the expected word is a decimal number (not an integer), one
    within the relative or absolute tolerance will do."""
    ours, theirs = found.split(), expected.split()
    return len(ours) == len(theirs) and all(
        word == wanted or (_DECIMAL.fullmatch(wanted) is not None and _close(word, wanted, tolerance))
        for word, wanted in zip(ours, theirs, strict=True))


def same_value(found: Any, expected: Any, tolerance: float) -> bool:
    """Equal as in Python, but floats within the tolerance, and lists like tuples (JSON has no tuples)."""
    if isinstance(found, float) or isinstance(expected, float):
        return _is_number(found) and _is_number(expected) and _near(found, expected, tolerance)
    if isinstance(expected, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(expected) and all(
            same_value(ours, theirs, tolerance) for ours, theirs in zip(found, expected, strict=True))
    if isinstance(expected, dict):
        return isinstance(found, dict) and found.keys() == expected.keys() and all(
            same_value(found[key], expected[key], tolerance) for key in expected)
    return found == expected


def _close(word: str, wanted: str, tolerance: float) -> bool:
    return _NUMBER.fullmatch(word) is not None and _near(float(word), float(wanted), tolerance)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _near(found: float, expected: float, tolerance: float) -> bool:
    try:
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance) or (
            math.isnan(found) and math.isnan(expected))
    except OverflowError:  # an integer beyond all floats
        return False
