"""Compares two outputs of a program, or two values of a function."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

__all__ = ["same_output", "same_value"]

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")  # linear: a program's word may be long
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][+-]?\d+)([eE][+-]?\d+)?")
LONG = 10 ** 4000  # Python writes no longer number as text


def same_output(found: str, expected: str, tolerance: float) -> bool:
    """Compares word by word; white space does not matter.

    If the expected word is a decimal number (not an integer), a number
    within the relative or absolute tolerance will do.
    """
    ours, theirs = found.split(), expected.split()
    return len(ours) == len(theirs) and all(
        word == wanted or (_DECIMAL.fullmatch(wanted) is not None and _close(word, wanted, tolerance))
        for word, wanted in zip(ours, theirs, strict=True))


def same_value(found: Any, expected: Any, tolerance: float) -> bool:
    """Equal as in Python, with these differences:

    - True and False are not numbers.
    - An expected float is met within the tolerance; an int must be exact (3.0 is 3, 3.0000001 is not).
    - A list equals a tuple of the same items, and a key that is a number equals its text: JSON has neither tuples nor
      such keys.
    """
    if isinstance(expected, bool) or isinstance(found, bool):
        return found is expected
    if isinstance(expected, float):
        return isinstance(found, (int, float, Fraction, Decimal)) and _near(found, expected, tolerance)
    if isinstance(expected, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(expected) and all(
            same_value(ours, theirs, tolerance) for ours, theirs in zip(found, expected, strict=True))
    if isinstance(expected, dict):
        if not isinstance(found, dict) or len(found) != len(expected):
            return False
        if all(isinstance(key, str) for key in expected):
            found = {str(key) if type(key) is int and abs(key) < LONG else key: value for key, value in found.items()}
        return found.keys() == expected.keys() and all(
            same_value(found[key], expected[key], tolerance) for key in expected)
    try:
        return bool(found == expected)
    except ArithmeticError:  # a signalling NaN
        return False


def _close(word: str, wanted: str, tolerance: float) -> bool:
    return _NUMBER.fullmatch(word) is not None and _near(float(word), float(wanted), tolerance)


def _near(found: Any, expected: float, tolerance: float) -> bool:
    try:
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance) or (
            math.isnan(found) and math.isnan(expected))
    except (OverflowError, ValueError):  # an integer beyond all floats; a signalling NaN
        return False
