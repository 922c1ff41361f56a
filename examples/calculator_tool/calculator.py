"""A calculator that a model calls in the middle of its response: `<calc>12*(3+4)</calc>` is answered with `=84`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Sequence

from megatron_rl.types import Prompt

CALL = re.compile(r"<calc>([0-9+\-*/(). ]{1,80})</calc>\s*$")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def step(prompt: Prompt, turns: Sequence[str]) -> str | None:
    """The result of the call that ends the last turn; None, which ends the response, when there is none."""
    call = CALL.search(turns[-1])
    if call is None:
        return None
    try:
        return f"={evaluate(call[1]):.10g}\n"
    except (SyntaxError, ZeroDivisionError, KeyError):
        return "=error\n"


def evaluate(expression: str) -> float:
    """Numbers, + - * / and brackets; KeyError for anything else. Nothing is executed."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant):
            return float(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise KeyError(type(node).__name__)

    return value(ast.parse(expression.strip(), mode="eval"))
