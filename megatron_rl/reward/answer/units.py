"""Units of measure: where the number ends and the unit begins, and which unit of pint (0.26.2) it is."""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

from megatron_rl.reward.answer.latex import closing_brace

__all__ = ["ratio", "same_unit", "split_unit"]

MAX_LENGTH = 200  # of a unit with its markup
_REWRITES = tuple((re.compile(pattern), text) for pattern, text in (
    (r"\^\s*\{([^{}]*)\}", r"^(\1)"), (r"\\text\{([^{}]*)\}(?=[A-Za-z])", r" \1 "),
    (r"\\text\{([^{}]*)\}", r" \1"),
    (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)"), (r"\\cdot ?", "*"),
    (r"\^\\circ\s*\{?\s*([CF])\b\}?", r" deg\1"), (r"\^\\circ", " degree"), (r"\\mu\s*", "micro_"),
    (r"\\Omega\s*", "ohm"), (r"\\AA\s*", "angstrom"), (r"%", " percent"), (r"\\\$", " dollar"),
    (r"\bdegrees?\s+(?:C|Celsius)\b", "degC"), (r"\bdegrees?\s+(?:F|Fahrenheit)\b", "degF"), (r"[{}]", ""),
    (r"\blight[- ]years?\b", "light_year"),
    (r"\b(?:square|sq\.?)\s+([A-Za-z]+)", r"\1^2"), (r"\bcubic\s+([A-Za-z]+)", r"\1^3"),
    (r"\bper\b", "/"), (r"micro_\s*", "micro"),
))
_COMMON = frozenset("km cm mm nm kg mg ml mL kJ MJ eV Pa kPa Hz kHz min hr hrs ft in yd mi mph kW MW kN mol rad ms "
                    "lb lbs oz cc dm".split())
_START = re.compile(r"\\text\{|\^\\circ|\\[A-Za-z]+|\\.|[A-Za-z]+|[()\[\]{}%]")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")  # the degrees are its argument's
_NOUNS = re.compile(r"""(?:[^\W\d_]|[\s'".,/*()$&_-]|\^\(?[+-]?[1-9]\)?|(?<=[a-z])[23](?!\w))*""")
_CHANGES = re.compile(
    r"^\W*(?:and|to|is|as|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b|"
    r"\b(?:half|halves|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|millionth|billionth)s?)"
    r"\W*$|\b(?:hundred|thousand|million|billion|trillion)\b|"
    r"\b(?:or|not|if|unless|except|otherwise|maybe|perhaps|possibly|wrong|incorrect|unknown|plus|minus|negative|squared|"
    r"cubed|factorial|choose|mod|modulo|remainder|below|divided|multiplied|than|least|most|out of)\b", re.IGNORECASE)
_WORDS = re.compile(r"(?:[A-Za-z]{3,})(?:\s+[A-Za-z]{2,})*$")


def split_unit(text: str, *, letters: bool) -> tuple[str, str] | None:
    """(number, unit) of an undressed text; None if no unit is written.

    A unit stands in \\text{...}, or is a degree, a percent sign, a currency, or a known abbreviation or word after a
    space. letters: any letters may be one, as in 9.8m/s^2. Arithmetic behind the unit, a second number, and words that
    change the number are no unit: 5 cm + 3 cm, 5 or 6, 5 squared.
    """
    parted = _parted(text, letters)
    return parted if parted and _may_be_unit(parted[1]) else None


def _parted(text: str, letters: bool) -> tuple[str, str] | None:
    if text.startswith("\\$"):
        return text[2:].strip(), "dollar"
    if text.startswith(("\\text{euro}", "\\text{pound}")):
        return text[text.index("}") + 1:].strip(), text[6:text.index("}")]
    depth = 0
    for match in _START.finditer(text):
        token = match[0]
        if token == "\\text{" and depth == 0:
            return re.sub(r"\\cdot\s*$", "", text[:match.start()]).strip(), text[match.start():]
        depth += (token in "([{" or token == "\\text{") - (token in ")]}")
        if depth or not match.start():
            continue
        if token in ("%", "^\\circ") and not _FUNCTION.search(text):
            rest = text[match.end():].strip()
            if not rest or re.fullmatch(r"\\text\{[^{}]*\}", rest) or (
                    token != "%" and re.fullmatch(r"\{?(?:\\text\{)?\s*[CF]\s*\}*", rest)):
                return text[:match.start()].strip(), text[match.start():]
        elif (letters and _may_begin(text, match)) or _is_word(text, match) or (
                token in ("\\frac", "\\mu") and is_unit(text[match.start():])
                and (token == "\\mu" or "\\text{" in text[match.end():])):
            return re.sub(r"\\cdot\s*$", "", text[:match.start()]).strip(), text[match.start():]
    return None


def _may_be_unit(text: str) -> bool:
    said = _rewritten(text)
    if _NOUNS.fullmatch(said) is None or said == "k" or re.match(r"\\text\{\s*[A-Za-z]+\s*\}\s*\(", text):
        return False  # arithmetic, 5 k, or a function of something
    if _unit(text) is not None:
        return True
    outside = re.sub(r"\\text\{[^{}]*\}|\\[A-Za-z]+", "", text) if text.startswith("\\") else ""
    if re.search("[A-Za-z]", outside):
        return False  # a variable
    return _CHANGES.search(said) is None


def _is_word(text: str, match: re.Match[str]) -> bool:
    spaced = text[match.start() - 1] == " " and match[0].isalpha()
    return spaced and (match[0] in _COMMON or (_WORDS.match(text, match.start()) is not None
                                               and bool(re.search("[aeiou]", match[0]))))


def _may_begin(text: str, match: re.Match[str]) -> bool:
    token = match[0]
    if token == "\\frac":
        return re.search(r"[A-Za-df-hj-z]", text[match.end():closing_brace(text, match.end())]) is not None
    exponent = token in ("e", "E") and re.match(r"\d[eE][+-]?\d", text[match.start() - 1:]) is not None
    return token in ("\\mu", "\\Omega", "\\AA") or (token.isalpha() and token not in ("e", "i") and not exponent)


@functools.cache
def _unit(text: str) -> Any | None:
    """The pint unit that a text means; None if it means none."""
    if len(text) > MAX_LENGTH:
        return None
    pint = importlib.import_module("pint")
    text = _rewritten(text)
    if not re.fullmatch(r"[A-Za-z0-9\s*/^()+._-]{1,80}", text) or re.match(r"[\d+^.-]", text):
        return None
    try:
        return _registry().parse_units(text)
    except (pint.PintError, ValueError, TypeError, AttributeError, SyntaxError, AssertionError, KeyError,
            ZeroDivisionError, OverflowError, RecursionError, IndexError):
        return None  # letters that are no unit: a formula, or words


def _rewritten(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).strip("* ")


def is_unit(text: str) -> bool:
    return _unit(text) is not None


def ratio(found: str, wanted: str, number: float) -> float | None:
    """`number` in the unit `found`, converted to `wanted`. An empty text is no unit. None if the kinds differ."""
    registry = _registry()
    ours, theirs = (_unit(text) if text else registry.dimensionless for text in (found, wanted))
    if ours is None or theirs is None:
        return None
    quantity = registry.Quantity(number, ours)
    return float(quantity.to(theirs).magnitude) if quantity.is_compatible_with(theirs) else None


def same_unit(found: str, wanted: str) -> bool:
    """Whether two units that pint does not know are the same, such as apples and apple."""
    return _word(found) == _word(wanted)


def _word(unit: str) -> str:
    return re.sub(r"\\text|[{}\s.]", "", unit).casefold().removesuffix("s")


@functools.cache
def _registry() -> Any:
    registry = importlib.import_module("pint").UnitRegistry(autoconvert_offset_to_baseunit=True, cache_folder=None)
    registry.define("dollar = [currency] = USD")
    registry.define("cent = 0.01 dollar")
    registry.define("euro = [euro_currency]")
    registry.define("pound_sterling = [pound_currency]")
    return registry
