"""When two readings are the same. The kind of the reference decides (docs/rewards.md says it for users)."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

from megatron_rl.reward.answer import units, words
from megatron_rl.reward.answer.formula import Node, names, read_formula
from megatron_rl.reward.answer.latex import Unreadable, plain
from megatron_rl.reward.answer.read import TURNED, Answer, Rules, is_name, read_one
from megatron_rl.reward.answer.value import agree, is_final, rational, same_formula, value

__all__ = ["BREAKS", "same"]

BREAKS = (ArithmeticError, ValueError, TypeError, RecursionError)
"""What numbers beyond all floats, complex ones, unlike units (pint) and trees that are too deep raise."""

DECIMAL_DIGITS = 6  # significant digits of a decimal that may stand for pi/4
ROUNDED_DIGITS = 3  # significant digits of a reference that may be a rounded value
LETTERS = 3  # of a run that is a product in an equation: nRT, and not the order BDAC

def same(found: list[Answer], wanted: list[Answer], rules: Rules) -> bool:
    """Whether any reading of the answer equals any reading of the reference."""
    return any(_is_met(ours, theirs, rules) for theirs in wanted for ours in found)


def _is_met(found: Answer, wanted: Answer, rules: Rules) -> bool:
    """A reading that breaks the arithmetic says nothing about the others."""
    try:
        return _same(found, wanted, rules)
    except BREAKS:
        return False


def _same(found: Answer, wanted: Answer, rules: Rules) -> bool:
    if found.kind == "relation" or wanted.kind == "relation":
        return _same_relation(found, wanted, rules)
    if found.kind != wanted.kind:
        return _across_kinds(found, wanted, rules)
    return _COMPARE[found.kind](found, wanted, rules)


def _across_kinds(found: Answer, wanted: Answer, rules: Rules) -> bool:
    for one, other in ((found, wanted), (wanted, found)):
        if one.kind == "list" and len(one.parts) == 1 and other.kind != "list":
            ours, theirs = (one.parts[0], other) if one is found else (other, one.parts[0])
            return _same(ours, theirs, rules)
    if wanted.kind == "based" and found.kind == "number":
        return found.parts[0].op == "num" and found.parts[0].args[1].lstrip("0") == wanted.parts[0][0]
    if wanted.kind == "ratio" and found.kind == "number" and len(wanted.parts) == 2:
        return _same_ratio(replace(found, parts=_as_ratio(found.parts[0])), wanted, rules)
    if wanted.kind in ("words", "text") or found.kind in ("words", "text"):
        return wanted.kind != "number" and _raw(found) is not None and _raw(wanted) is not None \
            and words.same_words(_raw(found), _raw(wanted))
    if {found.kind, wanted.kind} == {"formula", "number"} and wanted.kind == "formula":
        return not found.parts[1] and same_formula(found.parts[0], wanted.parts[0])
    return False


def _raw(answer: Answer) -> str | None:
    return answer.parts[0] if answer.kind in ("words", "text") else None


def _as_ratio(node: Node) -> tuple[Node, ...]:
    return node.args if node.op == "div" else (node, Node("num", (Fraction(1), "1")))


def _same_relation(found: Answer, wanted: Answer, rules: Rules) -> bool:
    if found.kind == wanted.kind:
        return _same_equation(found.parts, wanted.parts, rules)
    relation, other = (found, wanted) if found.kind == "relation" else (wanted, found)
    if relation.parts[0] != "=" or not is_name(relation.parts[1]):
        return False
    if other.name and plain(other.name) != plain(relation.parts[1]):
        return False
    inner = read_one(relation.parts[2], rules)
    return _same(inner, other, rules) if relation is found else _same(other, inner, rules)


def _same_equation(found: tuple[str, str, str], wanted: tuple[str, str, str], rules: Rules) -> bool:
    if found[0] == wanted[0] and plain(found[1]).replace(" ", "") == plain(wanted[1]).replace(" ", ""):
        if _same(read_one(found[2], rules), read_one(wanted[2], rules), rules):
            return True
        right = read_one(wanted[2], rules)
        if right.kind != "formula" and not (right.kind == "words" and len(plain(wanted[2])) <= LETTERS):
            return False
    try:
        sides = [(parts[0], read_formula(parts[1]), read_formula(parts[2])) for parts in (found, wanted)]
    except Unreadable:
        return words.same_words(" ".join(found), " ".join(wanted))
    if not names(sides[1][1]) | names(sides[1][2]) or (
            names(sides[1][1]) and not names(sides[1][2]) and sides[1][1].op == "sym"):
        return False  # x = 5 is solved, and asks for a solved one
    differences = [Node("add", (left, Node("neg", (right,)))) for _, left, right in sides]
    for sign, factor in _factors(*differences):
        if (sides[0][0] if sign > 0 else TURNED.get(sides[0][0])) == sides[1][0] and same_formula(
                Node("mul", (Node("num", (factor, "")), differences[0])), differences[1]):
            return True
    return False


def _factors(found: Node, wanted: Node) -> list[tuple[int, Fraction]]:
    """The constant that turns one side into the other, read at one point, with its sign."""
    at = {name: Fraction(7 + 4 * i, 13 + 3 * i) for i, name in enumerate(sorted(names(found) | names(wanted)))}
    try:
        below, above = value(found, at), value(wanted, at)
        factor = rational(above / below) if isinstance(above, Fraction) and isinstance(below, Fraction) and below \
            else rational(_quotient(above, below))
    except (Unreadable, ZeroDivisionError):
        return []
    return [] if not factor else [(1 if factor > 0 else -1, factor)]


def _quotient(above: Any, below: Any) -> Any:
    import mpmath

    ours, theirs = (mpmath.mpf(part.numerator) / part.denominator if isinstance(part, Fraction) else part
                    for part in (above, below))
    return ours / theirs


def _same_list(found: Answer, wanted: Answer, rules: Rules) -> bool:
    if len(found.parts) != len(wanted.parts):
        return False
    if found.name != wanted.name and any(part.kind == "pair" and part.name for part in found.parts):
        return False  # x<1 and x>2 is not x<1 or x>2
    if _unknowns(wanted) > 1 and not any(part.kind == "relation" for part in found.parts):
        return all(_same(ours, theirs, rules) for ours, theirs in zip(found.parts, wanted.parts, strict=True))
    left = list(found.parts)
    for theirs in wanted.parts:
        match = next((i for i, ours in enumerate(left) if _same(ours, theirs, rules)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _unknowns(answer: Answer) -> int:
    """How many unknowns a list gives a value: 2 in x=3, y=4; 1 in x_1=3, x_2=4."""
    return len({re.sub(r"_.*", "", plain(part.parts[1])) for part in answer.parts if part.kind == "relation"})


def _same_pair(found: Answer, wanted: Answer, rules: Rules) -> bool:
    if found.name and wanted.name and plain(found.name) != plain(wanted.name):
        return False
    (opening, ours, ending), (their_opening, theirs, their_ending) = found.parts, wanted.parts
    return (opening, ending) == (their_opening, their_ending) and len(ours) == len(theirs) and all(
        _same(one, other, rules) for one, other in zip(ours, theirs, strict=True))


def _same_matrix(found: Answer, wanted: Answer, rules: Rules) -> bool:
    return [len(row) for row in found.parts] == [len(row) for row in wanted.parts] and all(
        _same(one, other, rules) for ours, theirs in zip(found.parts, wanted.parts, strict=True)
        for one, other in zip(ours, theirs, strict=True))


def _same_ratio(found: Answer, wanted: Answer, rules: Rules) -> bool:
    """Whether the parts are in proportion. Each must be a number that is worked out, or a formula."""
    if len(found.parts) != len(wanted.parts) or not all(is_final(part) for part in found.parts if not names(part)):
        return False
    first, base = found.parts[0], wanted.parts[0]
    return all(same_formula(Node("mul", (part, base)), Node("mul", (theirs, first)))
               for part, theirs in zip(found.parts[1:], wanted.parts[1:], strict=True))


def _same_number(found: Answer, wanted: Answer, rules: Rules) -> bool:
    (node, unit), (reference, their_unit) = found.parts, wanted.parts
    if is_final(reference) and not is_final(node):
        return False
    if rules.tolerance is not None and (their_unit or unit or _decimal(reference) is not None):
        return _same_measure(value(node), unit, value(reference), their_unit, rules, count=_is_count(reference))
    return any(_same_exactly(ours, theirs) for ours, theirs in _in_one_unit(node, unit, reference, their_unit))


def _is_count(node: Node) -> bool:
    node = node.args[0] if node.op == "neg" else node
    return node.op == "num" and str(node.args[1]).isdigit()


def _same_measure(found: Any, unit: str, wanted: Any, their_unit: str, rules: Rules, *, count: bool) -> bool:
    """Within the tolerance, in the reference's unit.

    If the reference has no unit, the answer's is ignored, except percent.
    """
    tolerance = 0.0 if count and not their_unit else rules.tolerance or 0.0
    if their_unit and not units.is_unit(their_unit):
        return units.same_unit(unit, their_unit) and _close(found, wanted, tolerance)
    number = units.ratio(unit, their_unit, float(found)) if not unit or units.is_unit(unit) else None
    if number is None and not their_unit:
        number = float(found)
    return number is not None and _close(number, wanted, tolerance)


def _close(found: Any, wanted: Any, tolerance: float) -> bool:
    found, wanted = float(found), float(wanted)
    return abs(found - wanted) <= max(tolerance, 1e-9) * abs(wanted)


def _in_one_unit(node: Node, unit: str, reference: Node, their_unit: str) -> list[tuple[Node, Node]]:
    """Pairs of numbers, one of which must agree: as written if a unit is missing, else both in one unit."""
    number_of = {"%": "percent", "^\\circ": "degrees"}
    ours, theirs = (number_of.get(text.strip()) for text in (unit, their_unit))
    as_written = (node, reference)
    if unit.strip() == their_unit.strip():
        return [as_written]
    pairs = [(Node(ours, (node,)) if ours else node, Node(theirs, (reference,)) if theirs else reference)]
    if not unit or not their_unit:
        return [as_written, *(pairs if ours or theirs else [])]
    if ours or theirs:
        rad = {"degrees": r"rad|radians?"}
        other = unit if theirs else their_unit
        if re.fullmatch(rad.get(ours or theirs or "", "$^"), re.sub(r"\\text|[{}\s]", "", other)):
            return pairs
    if units.same_unit(unit, their_unit):
        return [as_written]
    exact = _converted(node, unit, their_unit)
    return [] if exact is None else [(exact, reference)]


def _converted(node: Node, unit: str, their_unit: str) -> Node | None:
    factor = units.ratio(unit, their_unit, 1.0) if units.is_unit(unit) and units.is_unit(their_unit) else None
    zero = units.ratio(unit, their_unit, 0.0) if factor is not None else None
    if factor is None or zero:
        return None
    exact = Fraction(factor).limit_denominator(10**9) if factor >= 1e-4 else 1 / Fraction(1 / factor).limit_denominator(
        10**5)
    return Node("mul", (node, Node("num", (exact, ""))))


def _same_exactly(ours: Node, theirs: Node) -> bool:
    """Equal; or six digits, rounded or cut off, for an irrational reference; or what rounds to a decimal reference."""
    found, wanted = value(ours), value(theirs)
    if agree(found, wanted):
        return True
    decimal, reference = _decimal(ours), _decimal(theirs)
    if decimal is not None and rational(wanted) is None and decimal[1] >= DECIMAL_DIGITS:
        return _within(wanted, decimal[0], decimal[2] / 2) or _within(
            wanted, decimal[0] + (decimal[2] / 2 if decimal[0] > 0 else -decimal[2] / 2), decimal[2] / 2)
    if reference is not None and reference[1] >= ROUNDED_DIGITS and not _terminates(found):
        return _within(found, reference[0], reference[2] / 2)
    return False


def _within(number: Any, decimal: Fraction, distance: Fraction) -> bool:
    import mpmath

    if isinstance(number, mpmath.mpc):
        return False
    number = mpmath.mpf(number.numerator) / number.denominator if isinstance(number, Fraction) else number
    return bool(abs(number - mpmath.mpf(decimal.numerator) / decimal.denominator)
                <= mpmath.mpf(distance.numerator) / distance.denominator)


def _terminates(number: Any) -> bool:
    exact = rational(number)
    if exact is None:
        return False
    below = exact.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def _decimal(node: Node) -> tuple[Fraction, int, Fraction] | None:
    """(value, significant digits, one unit of the last digit) of a decimal, also times a power of ten; else None."""
    if node.op == "neg":
        inner = _decimal(node.args[0])
        return None if inner is None else (-inner[0], *inner[1:])
    if node.op == "mul" and len(node.args) == 2 and node.args[1].op == "pow" and node.args[1].args[0] == Node(
            "num", (Fraction(10), "10")) and node.args[0].op == "num":
        inner, power = _decimal(node.args[0]), value(node.args[1])
        text = node.args[0].args[1]
        inner = inner or (node.args[0].args[0], len(text.strip("0")) or 1, Fraction(1))
        return (inner[0] * power, inner[1], inner[2] * power) if isinstance(power, Fraction) else None
    if node.op == "pow" and node.args[0] == Node("num", (Fraction(10), "10")):
        power = value(node)
        return (power, 1, power) if isinstance(power, Fraction) else None
    if node.op != "num" or not re.fullmatch(r"[\d.]+(?:[eE][+-]?\d+)?", str(node.args[1])) \
            or not re.search("[.eE]", str(node.args[1])):
        return None
    mantissa, _, exponent = str(node.args[1]).lower().partition("e")
    places = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return node.args[0], len(mantissa.replace(".", "").lstrip("0")), Fraction(10) ** -places


def _same_text(found: Answer, wanted: Answer, _: Rules) -> bool:
    """Equal as text, or as Math-Verify reads both if they hold the same letters and digits."""
    ours, theirs = found.parts[0], wanted.parts[0]
    if words.same_words(ours, theirs):
        return True
    letters = [sorted(re.findall(r"[A-Za-z0-9]", text)) for text in (ours, theirs)]
    if letters[0] != letters[1] or "\\" not in theirs or re.search(r"\\(?:angle|triangle|parallel|perp|over)", theirs):
        return False
    from math_verify import parse, verify  # here, because only workers need sympy

    gold, answer = (parse(f"${_latex(text)}$", parsing_timeout=None) for text in (theirs, ours))
    return all(len(each) > 1 and not isinstance(each[0], str) for each in (gold, answer)) and bool(
        verify(gold[:1], answer[:1], timeout_seconds=None))


def _latex(text: str) -> str:
    return text.replace("\u27e6", "\\{").replace("\u27e7", "\\}")


_COMPARE = {"number": _same_number, "list": _same_list, "pair": _same_pair, "matrix": _same_matrix, "text": _same_text,
            "ratio": _same_ratio,
            "formula": lambda found, wanted, _: same_formula(found.parts[0], wanted.parts[0]),
            "clock": lambda found, wanted, _: words.same_clock(found.parts[0], wanted.parts[0]),
            "based": lambda found, wanted, _: found.parts == wanted.parts,
            "words": lambda found, wanted, _: words.same_words(found.parts[0], wanted.parts[0])}
