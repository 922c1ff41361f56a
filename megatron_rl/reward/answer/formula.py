"""Reads a closed form or a formula from LaTeX into a tree. It computes no value.

The library behind Math-Verify (latex2sympy2_extended 1.11.0) computes while it reads: 8/2 arrives as 4, V as v, 180
degrees as 180, 1 1/2 as 1 and 6.02e-23 as 6.02 e - 23. A verdict needs what was written.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from megatron_rl.reward.answer.latex import NAMES, Unreadable

__all__ = ["Node", "names", "read_formula"]

MAX_DEPTH = 100
_NUMBER = r"\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_TOKEN = re.compile(rf"(?P<number>{_NUMBER})|(?P<command>\\[A-Za-z]+)|(?P<text>\\.)|(?P<letter>[A-Za-z])|"
                    r"(?P<sign>[-+/^_!|()\[\]{}=<>,:;%'.])|(?P<space>\s+)")
_EULER = re.compile(r"[2-9]\d*e-\d(?!\d)")  # 2e-1 is 2e - 1, 1e-3 and 2e-13 are powers of ten
ONE_ARGUMENT = frozenset("sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log lg exp".split())
INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
SYMBOLS = frozenset(f"\\{name}" for name in NAMES.split("|")) - {"\\pi"} | {"\\ell", "\\hbar"}
DECORATIONS = frozenset(("\\vec", "\\hat", "\\bar", "\\overline", "\\dot", "\\ddot", "\\tilde", "\\mathcal", "\\mathbb",
                         "\\text", "\\overrightarrow", "\\overset", "\\underline", "\\widehat"))
_CALLED = frozenset("fgFG")  # a letter that is a function if a bracket follows it
_FENCES = {"(": ")", "[": "]", "{": "}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_FENCE_NAMES = {"|": "abs", "\\lfloor": "floor", "\\lceil": "ceil"}


class Node(NamedTuple):
    """One operation and its arguments. Leaves: num (a Fraction and its text), sym (a name), const (pi, e, i, inf)."""

    op: str
    args: tuple[Any, ...]


def read_formula(text: str) -> Node:
    """The tree of an undressed text. Unreadable if the text is not exactly one formula."""
    parser = _Parser(_tokens(text))
    node = parser.sum(0)
    if parser.peek():
        raise Unreadable(f"{parser.peek()!r} has no place in a formula")
    return node


def names(node: Node) -> frozenset[str]:
    """The variables in a tree, and functions with unknown names."""
    if node.op == "sym":
        return frozenset(node.args)
    own = frozenset(node.args[:1]) if node.op == "call" else frozenset()
    return own.union(*(names(part) for part in node.args if isinstance(part, Node)))


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token. Spaces are kept, because 1 1/2 is not 11/2."""
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise Unreadable(f"{text[place]!r} has no place in a formula")
        kind, found = match.lastgroup or "", match[0]
        if kind == "number" and re.search("[eE]", found) and (
                _EULER.fullmatch(found) or re.match(r"[A-Za-z]", text[match.end():match.end() + 1])):
            found = re.split("[eE]", found)[0]
        if kind == "number" and found.endswith(".") and text[place + len(found):place + len(found) + 1] == ".":
            raise Unreadable("an ellipsis")
        tokens.append((kind, found))
        place += len(found)
    return tokens


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except ValueError as error:  # more digits than Python reads (4,300)
        raise Unreadable(str(error)) from error


class _Parser:
    """A recursive descent over the tokens; sum(depth) reads the loosest level."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self._tokens, self._place, self._bars = tokens, 0, 0

    def peek(self) -> str:
        self._skip()
        return self._tokens[self._place][1] if self._place < len(self._tokens) else ""

    def kind(self) -> str:
        self._skip()
        return self._tokens[self._place][0] if self._place < len(self._tokens) else ""

    def _skip(self) -> None:
        while self._place < len(self._tokens) and self._tokens[self._place][0] == "space":
            self._place += 1

    def next(self) -> str:
        token = self.peek()
        if not token:
            raise Unreadable("it ends too early")
        self._place += 1
        return token

    def expect(self, token: str) -> None:
        if self.peek() != token:
            raise Unreadable(f"{self.peek() or 'its end'!r} where {token!r} should be")
        self._place += 1

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("it is nested too deeply")
        terms = []
        while True:
            sign = ""
            while self.peek() in ("+", "-"):
                if sign:
                    raise Unreadable("two signs in a row")
                sign = self.next()
            term = self.product(depth + 1)
            terms.append(Node("neg", (term,)) if sign == "-" else term)
            if self.peek() not in ("+", "-"):
                return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def product(self, depth: int) -> Node:
        factors = [self.mixed(depth)]
        while True:
            token = self.peek()
            if token == "\\cdot":
                self.next()
                sign = self.peek() == "-" and self.next()
                factor = self.power(depth)
                factors.append(Node("neg", (factor,)) if sign else factor)
            elif token in ("/", "\\div"):
                self.next()
                over = factors[0] if len(factors) == 1 else Node("mul", tuple(factors))
                factors = [Node("div" if token == "/" else "quotient", (over, self.power(depth)))]
            elif self._starts_factor():
                if self.kind() == "number":
                    raise Unreadable("two numbers side by side")
                factors.append(self.power(depth))
            else:
                return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))

    def mixed(self, depth: int) -> Node:
        """A factor, or a whole number and a proper fraction beside it: 1 1/2."""
        first = self.power(depth)
        if first.op != "num" or not str(first.args[1]).isdigit():
            return first
        here = self._place
        if self.kind() == "number" or self.peek() == "\\frac":
            over = self.power(depth) if self.peek() == "\\frac" else self._slash(depth)
            if over is None or all(part.op == "num" and str(part.args[1]).isdigit() for part in over.args):
                if over is None or not 0 < over.args[0].args[0] < over.args[1].args[0]:
                    raise Unreadable("two numbers side by side")
                return Node("mixed", (first, over))
        self._place = here
        return first

    def _slash(self, depth: int) -> Node | None:
        above = self.power(depth)
        if self.peek() != "/":
            return None
        self.next()
        return Node("div", (above, self.power(depth)))

    def _starts_factor(self) -> bool:
        kind, token = self.kind(), self.peek()
        if kind in ("number", "letter"):
            return True
        if token == "|":
            return self._bars == 0
        return token in ("(", "{", "[") or token in _FENCES or (
            kind == "command" and (token in SYMBOLS or token in DECORATIONS or token[1:] in ONE_ARGUMENT
                                   or token in ("\\frac", "\\sqrt", "\\binom", "\\pi", "\\infty")))

    def power(self, depth: int) -> Node:
        node = self.base(depth + 1)
        while True:
            token = self.peek()
            if token == "!":
                self.next()
                node = Node("factorial", (node,))
            elif token == "%":
                self.next()
                node = Node("percent", (node,))
            elif token == "^":
                self.next()
                if self.peek() == "\\circ":
                    self.next()
                    node = Node("degrees", (node,))
                else:
                    node = Node("pow", (node, self.script(depth + 1)))
            else:
                return node

    def script(self, depth: int) -> Node:
        """What is raised: a group in braces, or one item with its sign."""
        sign = self.peek() in ("-", "+") and self.next()
        node = self.group("{", depth) if self.peek() == "{" else self.base(depth)
        return Node("neg", (node,)) if sign == "-" else node

    def group(self, fence: str, depth: int) -> Node:
        self.expect(fence)
        node = self.sum(depth + 1)
        self.expect(_FENCES[fence])
        return node

    def base(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("it is nested too deeply")
        kind, token = self.kind(), self.peek()
        if kind == "number":
            return self._number()
        if kind == "letter" or token in SYMBOLS or token in DECORATIONS:
            return self._symbol(depth)
        if token in ("(", "[", "{"):
            return self.group(token, depth)
        if token == "|":
            self._bars += 1
            node = Node("abs", (self.group(token, depth),))
            self._bars -= 1
            return node
        if token in _FENCE_NAMES:
            return Node(_FENCE_NAMES[token], (self.group(token, depth),))
        return self._command(depth)

    def _number(self) -> Node:
        text = self.next()
        if self.peek() == "\\overline":
            self.next()
            self.expect("{")
            repeated = self.next()
            self.expect("}")
            if "." not in text or not repeated.isdigit():
                raise Unreadable("a bar over what is no decimal")
            digits = len(text) - text.index(".") - 1
            period = Fraction(_fraction(repeated), (10 ** len(repeated) - 1) * 10 ** digits)
            return Node("num", (_fraction(text + "0") + period, f"{text}({repeated})"))
        return Node("num", (_fraction(text), text))

    def _symbol(self, depth: int) -> Node:
        token = self.next()
        if token in DECORATIONS:
            token = f"{token}{{{self._verbatim()}}}"
        while self.peek() == "'" or self.peek() == "_":
            if self.next() == "'":
                token += "'"
            else:
                token += "_" + (self._verbatim() if self.peek() == "{" else self.next())
        if token == "e":
            return Node("const", ("e",))
        if token == "i":
            return Node("const", ("i",))
        if token.rstrip("'") in _CALLED and self.peek() == "(":
            return Node("call", (token, self.group("(", depth)))
        return Node("sym", (token,))

    def _verbatim(self) -> str:
        self.expect("{")
        depth, pieces = 1, []
        while depth:
            token = self.next()
            depth += {"{": 1, "}": -1}.get(token, 0)
            pieces.append(token if depth else "")
        return "".join(pieces)

    def _command(self, depth: int) -> Node:
        token = self.next()
        if token in ("\\pi", "\\infty"):
            return Node("const", ({"\\pi": "pi", "\\infty": "inf"}[token],))
        if token in ("\\frac", "\\binom"):
            return Node("div" if token == "\\frac" else "binom", (self.group("{", depth), self.group("{", depth)))
        if token == "\\sqrt":
            index = self.group("[", depth) if self.peek() == "[" else Node("num", (Fraction(2), "2"))
            return Node("root", (self.group("{", depth), index))
        if token[1:] in ONE_ARGUMENT:
            return self._function(token[1:], depth)
        raise Unreadable(f"{token} has no place in a formula")

    def _function(self, name: str, depth: int) -> Node:
        power = base = None
        if name == "log" and self.peek() == "_":
            self.next()
            base = self.script(depth)
        if self.peek() == "^":
            self.next()
            power = self.script(depth)
            if power == Node("neg", (Node("num", (Fraction(1), "1")),)):
                if name not in INVERSES:
                    raise Unreadable(f"an inverse of {name}")
                name, power = INVERSES[name], None
        if self.peek() == "(":
            argument = self.group("(", depth)
        else:
            factors = [self.power(depth)]
            while self._starts_factor() and self.peek()[1:] not in ONE_ARGUMENT and self.peek() not in ("(", "["):
                factors.append(self.power(depth))
            argument = factors[0] if len(factors) == 1 else Node("mul", tuple(factors))
            if self.peek() == "/" and len(factors) == 1 and factors[0].op != "num":
                self.next()
                argument = Node("div", (argument, self.power(depth)))
        node = Node("log", (argument, base)) if base is not None else Node(name, (argument,))
        return node if power is None else Node("pow", (node, power))
