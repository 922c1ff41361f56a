"""Whether a box only repeats the question."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

from megatron_rl.reward.answer.formula import Node
from megatron_rl.reward.answer.latex import arguments, simplify
from megatron_rl.reward.answer.read import Answer, read_number

__all__ = ["is_copy"]

MAX_COPY = 1000  # characters of a box that is looked for in the question
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
    not copies, because a question may well name its answer.
    """
    ours = found[0]
    if not question or len(box) > MAX_COPY or (ours.kind == "number" and _is_simple(ours.parts[0])):
        return False
    text = _normal(question)
    known = {_shape(part) for theirs in wanted for number in _numbers(theirs) for part in _nodes(number)}
    parts = [part for number in _numbers(ours) for part in _nodes(number)]
    if any(_shape(part) not in known and _stands_in(part, text) for part in parts):
        return True
    if ours.kind not in ("number", "formula", "relation"):
        return False
    if ours.kind != "relation" and any(theirs.kind == ours.kind and _shape(ours.parts[0]) == _shape(theirs.parts[0])
                                       for theirs in wanted):
        return False
    return any(re.search(_BEFORE + r"\s*".join(map(re.escape, tokens)) + _AFTER, text)
               for form in _undressed(_normal(box)) if (tokens := re.findall(r"\\[A-Za-z]+|\d+|\S", form)))


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
