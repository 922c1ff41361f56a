"""Answers of science problems: numbers with units (pint 0.26.2) within a tolerance, formulas, words.

The reference decides what is asked for: a number with a unit, a bare number, or else a formula, which Math-Verify
judges, or words, which must be the same words.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from typing import Any

from megatron_rl.reward.base import Job, run, verdict
from megatron_rl.reward.boxed import last_boxed
from megatron_rl.reward.math import MathVerifyScorer, judge_math
from megatron_rl.types import Prompt, Score

__all__ = ["ScienceScorer", "judge_science"]

_NUMBER = re.compile(r"\s*(?:approx|about|~|=)?\s*([+-]?(?:\d+(?:,\d{3})+|\d+)?(?:\.\d*)?(?:e[+-]?\d+)?)", re.I)
_POWER_OF_TEN = re.compile(r"\s*(?:\*|x)\s*10\s*(?:\*\*|\^)\s*\(?\s*([+-]?\d+)\s*\)?")
_REWRITES = tuple((re.compile(pattern), text) for pattern, text in (
    (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
    (r"\\(?:text|mathrm|textrm|mathbf|operatorname|unit|rm)\s*\{([^{}]*)\}", r" \1"),
    (r"\\(?:left|right|displaystyle|mathrm|rm)(?![A-Za-z])", ""),
    (r"\\[,;:! ]|~|\\quad|\$", " "),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])\s*|[\u00b7\u22c5\u00d7]", "*"),
    (r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)"),
    (r"\^\s*\(?\s*\\circ\s*\)?\s*([CF])\b|\u00b0\s*([CF])\b", r" deg\1\2"),
    (r"\^\s*\(?\s*\\circ\s*\)?|\u00b0|\\degree", " degree"),
    (r"\\mu\s*|[\u00b5\u03bc]", "micro_"),
    (r"\\Omega|[\u2126\u03a9]", "ohm"),
    (r"\\AA|\u00c5|\u212b", "angstrom"),
    (r"\\%|%", " percent"),
    (r"\u2212", "-"),
))
_MICRO = re.compile(r"micro_\s*")


class ScienceScorer:
    """1 if the last \\boxed{...} is prompt.answer: a number within `relative_tolerance` in a unit of the same kind
    (5 km is 5000 m), a formula that is equal, or the same words. A reference that is a whole number without a unit
    is a count and must be met exactly. A unit is ignored where the reference has none; where it has one, an answer
    without is wrong. The prompt's metadata may hold a `tolerance` of its own.
    """

    preload = ("math_verify", "pint")

    def __init__(self, relative_tolerance: float):
        self._tolerance = relative_tolerance

    @staticmethod
    def warm_up() -> None:
        MathVerifyScorer.warm_up()
        judge_science("1 km", "1000 m", 0.01)

    def prepare(self, prompt: Prompt, response_text: str) -> Score | Job:
        box = last_boxed(response_text)
        if not box:
            return Score(0.0, "no_answer")
        answer, tolerance = prompt.answer.strip(), float(prompt.metadata.get("tolerance", self._tolerance))
        if box == answer:
            return verdict(True)
        return Job(judge_science, (box, answer, tolerance), ("science", box, answer, tolerance))

    def score(self, prompt: Prompt, response_text: str) -> Score:
        return run(self.prepare(prompt, response_text))


def judge_science(box: str, answer: str, tolerance: float) -> Score:
    """Whether two LaTeX answers are the same quantity, formula or words. No time limit."""
    wanted, found = _quantity(answer), _quantity(box)
    if wanted is not None and found is not None:
        return verdict(_same_quantity(found, wanted, 0.0 if _is_count(answer) else tolerance))
    if wanted is None and _words(box) == _words(answer):
        return verdict(True)
    if wanted is not None and wanted.units != wanted.units._REGISTRY.dimensionless:
        return verdict(False)  # a formula is no quantity; Math-Verify would read the unit as variables
    return judge_math(box, answer)


def _same_quantity(found: Any, wanted: Any, tolerance: float) -> bool:
    dimensionless = wanted.units._REGISTRY.dimensionless
    if wanted.units == dimensionless and not found.check("[]"):
        magnitude = found.magnitude
    elif not found.is_compatible_with(wanted):
        return False
    else:
        magnitude = found.to(wanted.units).magnitude
    return math.isclose(magnitude, wanted.magnitude, rel_tol=max(tolerance, 1e-9), abs_tol=0.0)


def _is_count(answer: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(?:,\d{3})*", answer.strip().strip("$")) is not None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", re.sub(r"\\(?:text|mathrm|textbf)\b", " ", text).casefold())


def _quantity(text: str) -> Any | None:
    """A pint Quantity if the text is one number and at most a unit; None for everything else."""
    text = text.strip().rstrip(".")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _MICRO.sub("micro", text)
    number = _NUMBER.match(text)
    if number is None or not any(letter.isdigit() for letter in number[1]):
        return None
    value, rest = float(number[1].replace(",", "")), text[number.end():]
    power = _POWER_OF_TEN.match(rest)
    if power is not None:
        value, rest = float(f"{number[1].replace(',', '')}e{power[1]}"), rest[power.end():]
    return _with_unit(value, rest.strip().strip("*").strip())


def _with_unit(value: float, unit: str) -> Any | None:
    pint = importlib.import_module("pint")
    registry = _registry()
    if not unit:
        return registry.Quantity(value, registry.dimensionless)
    if not re.fullmatch(r"[A-Za-z0-9\s*/^()+.-]{1,80}", unit) or re.match(r"[\d+^.-]", unit):
        return None
    try:
        return registry.Quantity(value, registry.parse_units(unit))
    except (pint.PintError, ValueError, TypeError, AttributeError, SyntaxError, AssertionError, KeyError,
            ZeroDivisionError, OverflowError, RecursionError, IndexError):
        return None  # letters that are no unit: a formula such as 2 x + 3, or words


@functools.cache
def _registry() -> Any:
    return importlib.import_module("pint").UnitRegistry(autoconvert_offset_to_baseunit=True, cache_folder=None)
