"""Whether a box only repeats the question."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from megatron_rl.reward.answer.formula import Node
from megatron_rl.reward.answer.latex import arguments, simplify
from megatron_rl.reward.answer.read import Answer

__all__ = ["is_copy", "same_shape"]

MAX_COPY = 1000  # characters of a box that is looked for in the question


def is_copy(box: str, question: str) -> bool:
    """Whether the boxed text stands in the question as the whole of a formula there, spacing and spelling aside."""
    if len(box) > MAX_COPY:
        return False
    tokens = re.findall(r"\\[A-Za-z]+|\d+|\S", _question(box))
    pattern = r"(?<![\w.^_+*/\\-])" + r"\s*".join(map(re.escape, tokens)) + r"(?!\s*[\^_+*/\\-])(?!\w|\.\d)"
    return bool(tokens) and re.search(pattern, _question(question)) is not None


@functools.lru_cache(maxsize=4096)
def _question(text: str) -> str:
    return arguments(simplify(text))


def same_shape(found: list[Answer], wanted: list[Answer]) -> bool:
    """Whether an answer is written as the reference is, but for the order of terms and factors, or is one numeral."""
    ours = found[0]
    if ours.kind == "number" and _is_simple(ours.parts[0]):
        return True
    if ours.kind not in ("number", "formula"):
        return ours.kind != "relation"
    return any(theirs.kind == ours.kind and _shape(ours.parts[0]) == _shape(theirs.parts[0]) for theirs in wanted)


def _is_simple(node: Node) -> bool:
    """A numeral, or a fraction of numerals in lowest terms."""
    node = node.args[0] if node.op == "neg" else node
    if node.op != "div":
        return node.op in ("num", "mixed")
    above, below = (part.args[0] if part.op == "neg" else part for part in node.args)
    return above.op == below.op == "num" and math.gcd(*(part.args[0].numerator for part in (above, below))) == 1


def _shape(node: Node) -> Any:
    if node.op == "num":
        return str(node.args[0])
    parts = [_shape(part) if isinstance(part, Node) else part for part in node.args]
    return node.op, *(sorted(parts, key=repr) if node.op in ("add", "mul") else parts)
