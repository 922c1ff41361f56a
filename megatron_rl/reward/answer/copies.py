"""Whether a box only repeats the question."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from megatron_rl.reward.answer.formula import Node, read_formula
from megatron_rl.reward.answer.latex import Unreadable, arguments, simplify, undress
from megatron_rl.reward.answer.read import Answer, is_name, read_number

__all__ = ["is_copy"]

MAX_COPY = 1000  # characters of a box, or of a formula of the question
MAX_FORMULAS = 200  # the last ones of a question: examples come first
_MATH = re.compile(r"\$\$?(.{1,1000}?)\$|\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]", re.DOTALL)
_RUN = re.compile(r"(?:\\(?!text)[A-Za-z]+|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|\d+(?:\.\d+)?|[-+/^_!(){}\[\]|'=]|\s)+")
_BETWEEN = re.compile(r"[,;:?<>]|\.(?!\d)|\\(?:le|ge|ne|in|approx|to|text|quad)(?![A-Za-z])")
_BEFORE, _AFTER = r"(?<![\w.^_+*/\\-])", r"(?!\s*[\^_+*/\\-])(?!\w|\.\d)"
_DRESSED = re.compile(r"[({[]\s*(?P<inner>.*?)\s*[)}\]]|[A-Za-z]\s*=\s*(?P<right>.*)|\+\s*(?P<plus>.*)", re.DOTALL)
_PARTS = {  # what a question may ask to work out, as it is written there
    "div": r"\\frac\{{{0}\}}\{{{1}\}}|(?<![\d.]){0}\s*/\s*{1}(?![\d.])",
    "pow": r"(?<![\d.]){0}\s*\^\s*\{{?{1}(?!\d)",
    "root": r"\\sqrt\{{{0}\}}|\\sqrt\[{1}\]\{{{0}\}}", "factorial": r"(?<![\d.]){0}\s*!",
    "binom": r"\\binom\{{{0}\}}\{{{1}\}}"}


def is_copy(box: str, found: list[Answer], wanted: list[Answer], question: str) -> bool:
    """Whether the question contains the number or formula, and the reference does not.

    A copy is a whole formula of the question, in brackets or not. It may also be a number with a power, root, factorial
    or binomial of numerals, or with a fraction that is not in lowest terms. Numerals and fractions in lowest terms are
    not copies, because a question may well name its answer. Another spelling of a copy is one too (_restates).
    """
    ours, wanted = _bare(found[0]), [_bare(theirs) for theirs in wanted]
    if not question or len(box) > MAX_COPY or (ours.kind == "number" and _is_simple(ours.parts[0])):
        return False
    text = _normal(question)
    known = {_shape(part) for theirs in wanted for number in _numbers(theirs) for part in _nodes(number)}
    parts = [part for number in _numbers(ours) for part in _nodes(number)]
    if any(_shape(part) not in known and _stands_in(part, text) for part in parts):
        return True
    if ours.kind not in ("number", "formula", "relation"):
        return False
    if _restates(ours, wanted, question):
        return True
    if ours.kind != "relation" and any(theirs.kind == ours.kind and _shape(ours.parts[0]) == _shape(theirs.parts[0])
                                       for theirs in wanted):
        return False
    return any(re.search(_BEFORE + r"\s*".join(map(re.escape, tokens)) + _AFTER, text)
               for form in _undressed(_normal(box)) if (tokens := re.findall(r"\\[A-Za-z]+|\d+|\S", form)))


def _bare(answer: Answer) -> Answer:
    """The item of a set of one."""
    return answer.parts[0] if answer.kind == "list" and len(answer.parts) == 1 else answer


@functools.lru_cache(maxsize=4096)
def _normal(text: str) -> str:
    return arguments(simplify(text))


def _undressed(box: str) -> Iterator[str]:
    """The box, and what is left of it without brackets, and without a name or a plus sign before it."""
    match: re.Match[str] | None
    while box:
        yield box
        match = _DRESSED.fullmatch(box)
        box = next((part for part in match.groups() if part), "") if match else ""


def _numbers(answer: Answer) -> Iterator[Node]:
    """The trees of the numbers in an answer."""
    if answer.kind == "number":
        yield answer.parts[0]
    elif answer.kind == "relation":
        for number in (read_number(side) for side in answer.parts[1:]):
            if number is not None:
                yield number
    else:
        items = {"list": answer.parts, "pair": answer.parts[1:2], "matrix": answer.parts}.get(answer.kind, ())
        for item in items:
            for each in item if isinstance(item, tuple) else (item,):
                yield from _numbers(each)


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for part in node.args:
        if isinstance(part, Node):
            yield from _nodes(part)


def _stands_in(node: Node, question: str) -> bool:
    """Whether the question contains a part that could be worked out."""
    if node.op not in _PARTS or _is_simple(node) or any(part.op != "num" for part in node.args):
        return False
    return re.search(_PARTS[node.op].format(*(re.escape(part.args[1]) for part in node.args)), question) is not None


def _is_simple(node: Node) -> bool:
    """A numeral, or a fraction of numerals in lowest terms."""
    node = node.args[0] if node.op == "neg" else node
    if node.op != "div":
        return node.op in ("num", "mixed")
    above, below = (part.args[0] if part.op == "neg" else part for part in node.args)
    return above.op == below.op == "num" and math.gcd(*(part.args[0].numerator for part in (above, below))) == 1


def _shape(node: Node) -> Any:
    """The tree with terms and factors in one order."""
    if node.op == "num":
        return str(node.args[0])
    parts = [_shape(part) if isinstance(part, Node) else part for part in node.args]
    return node.op, *(sorted(parts, key=repr) if node.op in ("add", "mul") else parts)


def _restates(ours: Answer, wanted: list[Answer], question: str) -> bool:
    """Whether the answer is a formula of the question but for the order of its terms, factors of 1, signs and the like:
    (1+x)^{2}, -(-(x+1)^2) and (x+1)(x+1) are (x+1)^2. The reference's own form is not refused."""
    for merged in (False, True):
        known = {_form(part, merged) for theirs in wanted for tree in _trees(theirs) for part in _restatable(tree)}
        said = {_form(part, merged) for tree in _trees(ours)
                for part in (_restatable(tree) if ours.kind == "number" else [tree])}
        if not known.issuperset(said & _asked(question, merged)):
            return True
    return False


def _trees(answer: Answer) -> list[Node]:
    """The formula or number of an answer, also after a name; an equation is one tree, of either order."""
    if answer.kind in ("number", "formula"):
        return [answer.parts[0]]
    return _equation(*answer.parts[1:]) if answer.kind == "relation" and answer.parts[0] == "=" else []


def _equation(left: str, right: str) -> list[Node]:
    try:
        sides = [read_formula(right)] if is_name(left) else [read_formula(left), read_formula(right)]
    except Unreadable:
        return []
    return sides if len(sides) == 1 else [Node("equation", tuple(sides))]


def _restatable(tree: Node) -> list[Node]:
    """The tree itself, and its powers, roots and the like of numerals."""
    return [tree, *(part for part in _nodes(tree) if part.op in _PARTS and not _is_simple(part)
                    and all(each.op == "num" for each in part.args))]


@functools.lru_cache(maxsize=1024)
def _asked(question: str, merged: bool) -> frozenset[Any]:
    """The forms of the question's formulas: of what stands between signs for mathematics, and of runs of symbols."""
    runs = [simplify(next(filter(None, match.groups()))) for match in [*_MATH.finditer(question)][-MAX_FORMULAS:]]
    runs += [run for match in _RUN.finditer(_normal(question)) if len(run := match[0].strip()) > 2][-MAX_FORMULAS:]
    pieces = [piece for run in runs for piece in _BETWEEN.split(arguments(run)) if 2 < len(piece.strip()) <= MAX_COPY]
    forms: set[Any] = set()
    for piece in pieces:
        sides = piece.split("=")
        try:
            trees = [read_formula(undress(side)) for side in sides if side.strip()]
            trees += [Node("equation", tuple(trees))] if len(trees) == len(sides) == 2 else []
            forms.update(_form(part, merged) for tree in trees for part in _restatable(tree))
        except (ArithmeticError, ValueError, RecursionError):  # no formula, or none that has a value
            continue
    return frozenset(forms)


def _form(node: Node, merged: bool) -> tuple[Fraction, tuple[Any, ...]]:
    """A tree as a number and factors (base, exponent), in one order and without ones. merged: like terms, and powers of
    one base, are put together."""
    if node.op == "num":
        return node.args[0], ()
    if node.op == "equation":
        return Fraction(1), (("equation", *sorted((_form(side, merged) for side in node.args), key=repr)),)
    if node.op == "neg":
        number, factors = _form(node.args[0], merged)
        return -number, factors
    if node.op == "add":
        return _form_of_sum(node, merged)
    if node.op in ("mul", "div", "quotient"):
        return _form_of_product(node, merged)
    if node.op in ("pow", "root"):
        return _form_of_power(node, merged)
    parts = tuple(_form(part, merged) if isinstance(part, Node) else part for part in node.args)
    return Fraction(1), (((node.op, *parts), Fraction(1)),)


def _form_of_sum(node: Node, merged: bool) -> tuple[Fraction, tuple[Any, ...]]:
    terms: list[tuple[Fraction, tuple[Any, ...]]] = []
    for number, factors in (_form(part, merged) for part in node.args):
        inner = factors[0][0] if len(factors) == 1 and factors[0][1] == 1 else ()
        terms += [(number * each, rest) for each, rest in inner[1]] if inner[:1] == ("sum",) else [(number, factors)]
    if merged:
        total: dict[tuple[Any, ...], Fraction] = {}
        for number, factors in terms:
            total[factors] = total.get(factors, Fraction(0)) + number
        terms = [(number, factors) for factors, number in total.items()]
    terms = sorted((term for term in terms if term[0]), key=lambda term: (repr(term[1]), abs(term[0])))
    if len(terms) < 2:
        return terms[0] if terms else (Fraction(0), ())
    sign = Fraction(1 if terms[0][0] > 0 else -1)
    return sign, ((("sum", tuple((sign * number, factors) for number, factors in terms)), Fraction(1)),)


def _form_of_product(node: Node, merged: bool) -> tuple[Fraction, tuple[Any, ...]]:
    product, factors = Fraction(1), []
    for place, part in enumerate(node.args):
        number, more = _form(part, merged)
        power = -1 if place and node.op != "mul" else 1
        product *= number ** power
        factors += [(base, exponent * power) for base, exponent in more]
    if merged:
        total: dict[Any, Fraction] = {}
        for base, exponent in factors:
            total[base] = total.get(base, Fraction(0)) + exponent
        factors = list(total.items())
    return product, tuple(sorted((factor for factor in factors if factor[1]), key=repr))


def _form_of_power(node: Node, merged: bool) -> tuple[Fraction, tuple[Any, ...]]:
    (number, factors), (exponent, unknown) = (_form(part, merged) for part in node.args)
    if unknown:
        return Fraction(1), (((node.op, (number, factors), (exponent, unknown)), Fraction(1)),)
    power = exponent if node.op == "pow" else 1 / exponent
    if power == 1:
        return number, factors
    if factors and (number == 1 or (number == -1 and power.denominator == 1)):
        return number ** (power.numerator % 2 if number == -1 else 1), tuple(
            (base, each * power) for base, each in factors)
    return Fraction(1), (((number, factors), power),)
