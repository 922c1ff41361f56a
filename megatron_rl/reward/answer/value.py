"""The value of a formula: exact fractions as far as they go, beyond that 80 digits. Also whether it was worked out."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from megatron_rl.reward.answer.formula import Node, names
from megatron_rl.reward.answer.latex import Unreadable

__all__ = ["Number", "agree", "is_final", "rational", "same_formula", "value"]

DIGITS = 80
AGREE_DIGITS = 60
BIG = 10**12  # what nobody has to write out: 2^{100}-1 may stay
POINTS, FEWEST_POINTS = 12, 3
Number = Any  # Fraction, mpmath.mpf or mpmath.mpc


def value(node: Node, at: Mapping[str, Number] | None = None) -> Number:
    """The number that a tree stands for, with its variables at `at`. Unreadable outside of its domain (1/0, ln 0).

    Real numbers only, unless i is written: the square root of -4 is refused, and -4 has a real cube root. A decimal is
    an exact fraction. No time limit: 9^{9^9} is computed.
    """
    import mpmath  # here, because only workers need it

    mpmath.mp.dps = DIGITS
    try:
        return _value(node, at or {}, mpmath)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
        raise error if isinstance(error, Unreadable) else Unreadable(f"it has no value ({error})") from error


def rational(number: Number) -> Fraction | None:
    """The fraction with a denominator up to a million that equals the number to 60 digits; None if there is none."""
    if isinstance(number, Fraction):
        return number
    import mpmath

    if isinstance(number, mpmath.mpc) and agree(number, number.real):
        number = number.real
    if not isinstance(number, mpmath.mpf) or not mpmath.isfinite(number) or abs(number) > BIG:
        return None
    near = Fraction(int(mpmath.nint(number * 10**DIGITS)), 10**DIGITS).limit_denominator(10**6)
    return near if agree(number, near) else None


def agree(one: Number, other: Number) -> bool:
    """Whether two numbers are the same: fractions exactly, others to 60 digits."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    import mpmath

    one, other = _real(one, mpmath), _real(other, mpmath)
    if not mpmath.isfinite(one) or not mpmath.isfinite(other):
        return one == other
    # beside an exact zero, the digits that a sum has lost count: sin(pi) is 1e-81
    scale = max(abs(one), abs(other)) if one and other else mpmath.mpf(10) ** -15
    return bool(abs(one - other) <= mpmath.mpf(10) ** -AGREE_DIGITS * scale)


def is_final(node: Node) -> bool:
    """Whether a tree without variables leaves nothing to be worked out (docs/rewards.md says what may stay)."""
    rule = _FINAL.get(node.op)
    return rule is not None and rule(node)


def same_formula(one: Node, other: Node) -> bool:
    """Whether two trees agree at every point at which both have a value. Points are drawn from the trees' own names.

    Points are positive first, then of either sign; whole numbers if the domain has no others, as with (-1)^n.
    """
    variables = sorted(names(one) | names(other))
    rng = random.Random(0)
    for draw in (_real_point, _whole_point):
        met = 0
        for turn in range(POINTS):
            at = {name: draw(rng, turn) for name in variables}
            try:
                found, wanted = value(one, at), value(other, at)
            except Unreadable:
                continue
            if not agree(found, wanted):
                return False
            met += 1
        if met >= FEWEST_POINTS:
            return True
    return False


def _real_point(rng: random.Random, turn: int) -> Fraction:
    size = Fraction(rng.randint(10_000, 99_999), 100_000) * (1 if turn % 2 else 7)
    return size if turn < POINTS // 2 or rng.random() < 0.5 else -size


def _whole_point(rng: random.Random, turn: int) -> Fraction:
    return Fraction(rng.randint(1, 9 + turn))


def _value(node: Node, at: Mapping[str, Number], mpmath: Any) -> Number:
    if node.op == "num":
        return node.args[0]
    if node.op == "const":
        return {"pi": lambda: +mpmath.pi, "e": lambda: +mpmath.e, "i": lambda: mpmath.mpc(0, 1),
                "inf": lambda: mpmath.inf}[node.args[0]]()
    if node.op == "sym":
        if node.args[0] not in at:
            raise Unreadable(f"{node.args[0]} has no value")
        return at[node.args[0]]
    if node.op == "call":  # a function of no known name: any fixed one, a different one for each name
        own = 3 + zlib.crc32(node.args[0].encode()) % 9973
        return mpmath.sin(_real(_value(node.args[1], at, mpmath), mpmath) * own + 1) + 2
    parts = [_value(part, at, mpmath) for part in node.args]
    if node.op in _ARITHMETIC:
        return _ARITHMETIC[node.op](*parts)
    return _FUNCTIONS[node.op](mpmath, *parts)


def _add(*parts: Number) -> Number:
    total = parts[0]
    for part in parts[1:]:
        total = _mixed(total, part, lambda a, b: a + b)
    return total


def _mul(*parts: Number) -> Number:
    product = parts[0]
    for part in parts[1:]:
        product = _mixed(product, part, lambda a, b: a * b)
    return product


def _div(above: Number, below: Number) -> Number:
    if not below:
        raise Unreadable("a division by zero")
    return _mixed(above, below, lambda a, b: a / b)


def _mixed(one: Number, other: Number, rule: Callable[[Number, Number], Number]) -> Number:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return rule(one, other)
    import mpmath

    return rule(_real(one, mpmath), _real(other, mpmath))


def _real(number: Number, mpmath: Any) -> Number:
    return mpmath.mpf(number.numerator) / number.denominator if isinstance(number, Fraction) else number


def _pow(base: Number, exponent: Number) -> Number:
    import mpmath

    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        if not base and exponent < 0:
            raise Unreadable("a division by zero")
        return base ** int(exponent)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        return _root(base, Fraction(exponent.denominator)) ** exponent.numerator
    base, exponent = _real(base, mpmath), _real(exponent, mpmath)
    if isinstance(base, mpmath.mpf) and base < 0:
        raise Unreadable("a power of a negative number")
    return mpmath.power(base, exponent)


def _root(radicand: Number, index: Number) -> Number:
    import mpmath

    if not isinstance(index, Fraction) or index.denominator != 1 or index < 1:
        return _pow(radicand, _div(Fraction(1), index))
    if isinstance(radicand, mpmath.mpc):
        return mpmath.root(radicand, int(index))
    if radicand < 0:
        if int(index) % 2 == 0:
            raise Unreadable("an even root of a negative number")
        return -_root(-radicand, index)
    if isinstance(radicand, Fraction):
        above, below = (_whole_root(part, int(index)) for part in (radicand.numerator, radicand.denominator))
        if above is not None and below is not None:
            return Fraction(above, below)
    return mpmath.root(_real(radicand, mpmath), int(index))


def _whole_root(number: int, index: int) -> int | None:
    """The whole index-th root of a whole number, if it has one (Newton's method, all in whole numbers)."""
    if number < 2 or index == 1:
        return number
    if index >= number.bit_length():
        return None
    guess = 1 << -(-number.bit_length() // index)
    while True:
        better = ((index - 1) * guess + number // guess ** (index - 1)) // index
        if better >= guess:
            return guess if guess ** index == number else None
        guess = better


def _whole(number: Number) -> int:
    if not isinstance(number, Fraction) or number.denominator != 1 or number < 0:
        raise Unreadable("a whole number is asked for")
    return int(number)


def _factorial(mpmath: Any, number: Number) -> Number:
    if isinstance(number, Fraction) and number.denominator == 1:
        return Fraction(math.factorial(_whole(number)))
    return mpmath.gamma(_real(number, mpmath) + 1)


def _binom(mpmath: Any, above: Number, below: Number) -> Number:
    if isinstance(above, Fraction) and isinstance(below, Fraction) and above.denominator == below.denominator == 1:
        return Fraction(math.comb(_whole(above), _whole(below)))
    return mpmath.binomial(_real(above, mpmath), _real(below, mpmath))


def _ln(mpmath: Any, number: Number) -> Number:
    number = _real(number, mpmath)
    if not number or (isinstance(number, mpmath.mpf) and number < 0):
        raise Unreadable("a logarithm of no positive number")
    return mpmath.log(number)


def _arc(name: str) -> Callable[[Any, Number], Number]:
    def inverse(mpmath: Any, number: Number) -> Number:
        number = _real(number, mpmath)
        if name != "atan" and isinstance(number, mpmath.mpf) and abs(number) > 1:
            raise Unreadable(f"an {name} beyond 1")
        return getattr(mpmath, name)(number)
    return inverse


def _of_mpmath(name: str) -> Callable[[Any, Number], Number]:
    return lambda mpmath, number: getattr(mpmath, name)(_real(number, mpmath))


_ARITHMETIC: dict[str, Callable[..., Number]] = {
    "add": _add, "mul": _mul, "div": _div, "quotient": _div, "neg": lambda a: -a, "pow": _pow, "root": _root,
    "mixed": _add, "percent": lambda a: _div(a, Fraction(100))}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    **{name: _of_mpmath(name) for name in (
        "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp")},
    "arcsin": _arc("asin"), "arccos": _arc("acos"), "arctan": _arc("atan"), "ln": _ln,
    "log": lambda mpmath, a, base=None: _ln(mpmath, a) if base is None else _ln(mpmath, a) / _ln(mpmath, base),
    "lg": lambda mpmath, a: _ln(mpmath, a) / mpmath.log(10),
    "abs": lambda _, a: abs(a), "floor": lambda mpmath, a: Fraction(math.floor(a)),
    "ceil": lambda mpmath, a: Fraction(math.ceil(a)), "factorial": _factorial, "binom": _binom,
    "degrees": lambda mpmath, a: _real(a, mpmath) * mpmath.pi / 180}


def _final_sum(node: Node) -> bool:
    """Whether no terms are alike, those of inner sums too: one rational at most, and not 0, no rational multiple of
    another.

    Powers and the like that are big may stand beside others, unless they cancel out.
    """
    terms = _terms(node)
    if not all(is_final(term) for term in terms):
        return False
    values = [value(term) for term in terms]
    if _is_long(value(node)):
        values = [number for number, term in zip(values, terms, strict=True)
                  if abs(number) <= BIG or _strip(term).op == "num"]
    plain = [number for number in values if rational(number) is not None]
    rest = [number for number in values if rational(number) is None]
    return len(plain) <= 1 and 0 not in plain and not any(
        rational(_div(one, other)) is not None for i, one in enumerate(rest) for other in rest[:i])


def _is_long(number: Number) -> bool:
    return max(abs(number.numerator), number.denominator) > BIG if isinstance(number, Fraction) else abs(number) > BIG


def _terms(node: Node) -> list[Node]:
    if node.op == "add":
        return [term for part in node.args for term in _terms(part)]
    return _terms(node.args[0]) if node.op == "neg" and _strip(node).op in ("add", "neg") else [node]


def _final_product(node: Node) -> bool:
    """At most one plain number, and at most one sum; no roots that are rational, and irrational factors do not make a
    rational number."""
    factors = [_strip(factor) for factor in node.args]
    if not all(is_final(factor) for factor in factors):
        return False
    plain = [factor for factor in factors if _is_plain(factor) or _is_first_power(factor)]
    sums = [factor for factor in factors if factor.op == "add"]
    if any(factor.op == "root" and rational(value(factor)) is not None for factor in factors):
        return False
    if len(plain) > 1 or len(sums) > 1 or (sums and rational(value(sums[0])) is not None):
        return False
    irrational = [value(factor) for factor in factors if rational(value(factor)) is None]
    return not irrational or rational(_mul(*irrational)) is None


def _is_plain(node: Node) -> bool:
    """A numeral, or a fraction of numerals."""
    return node.op in ("num", "mixed", "percent") or (node.op == "div" and all(_is_plain(_strip(part))
                                                                              for part in node.args))


def _is_first_power(node: Node) -> bool:
    """17^1, which is no power; 10^1 may belong to a number such as 5.1*10^1."""
    return node.op == "pow" and _is_plain(node.args[0]) and value(node.args[0]) != 10 and value(node.args[1]) == 1


def _strip(node: Node) -> Node:
    return node.args[0] if node.op == "neg" else node


def _final_fraction(node: Node) -> bool:
    above, below = node.args
    if not is_final(above) or not is_final(below) or (_has(above, "factorial") and _has(below, "factorial")):
        return False
    if any(_is_plain(_strip(part)) and _strip(part).op != "num" for part in (above, below)):
        return False  # a fraction of fractions
    sums = [part for part in (above, below) if _strip(part).op == "add"]
    if any(rational(value(part)) is not None for part in sums) and not _is_long(value(node)):
        return False  # (10^13*12 + 10^13*39) / 10^13
    both = [value(part) for part in (above, below)]
    return len(sums) < 2 and not (all(rational(number) is None for number in both)
                                  and rational(_div(*both)) is not None)


def _final_function(node: Node) -> bool:
    """ln 2 and sin 1 stay; log_2 8, sin 60 degrees and arctan 1 have simpler values."""
    import mpmath

    if not all(is_final(part) for part in node.args):
        return False
    found = value(node)
    return rational(found) is None and rational(_mul(found, found)) is None and rational(
        _div(found, +mpmath.pi)) is None


def _final_power(node: Node) -> bool:
    base, exponent = node.args
    if _strip(base).op == "const" and _strip(base).args == ("i",):
        return False
    return is_final(base) and is_final(exponent) and base.op not in ("pow", "root") and not (
        base.op == "add" and rational(value(base)) is not None) and _is_simplest(node, base, exponent)


def _final_root(node: Node) -> bool:
    return _parts(node) and _is_simplest(node, *node.args)


def _is_simplest(node: Node, base: Node, exponent: Node) -> bool:
    """Whether a power or root is irrational, or has nothing in it that could be worked out: neither a logarithm above,
    nor more than a numeral under a root."""
    if rational(value(node)) is None:
        return True
    if any(_has(exponent, name) for name in ("ln", "log", "lg")):
        return False
    power = rational(value(exponent))
    whole = node.op != "root" and (power is None or power.denominator == 1)
    return whole or _is_plain(_strip(base))


def _of_numerals(node: Node) -> bool:
    return all(part.op == "num" for part in node.args)


def _parts(node: Node) -> bool:
    return all(is_final(part) for part in node.args)


def _has(node: Node, op: str) -> bool:
    return node.op == op or any(_has(part, op) for part in node.args if isinstance(part, Node))


_FINAL: dict[str, Callable[[Node], bool]] = {
    "num": lambda _: True, "const": lambda _: True, "mixed": lambda _: True, "percent": _parts, "degrees": _parts,
    "neg": lambda node: node.args[0].op != "neg" and is_final(node.args[0]),
    "add": _final_sum, "mul": _final_product, "div": _final_fraction, "pow": _final_power, "root": _final_root,
    "factorial": _of_numerals, "binom": _of_numerals,
    "exp": lambda node: _parts(node) and _is_simplest(node, node, node.args[0]),
    **dict.fromkeys(("ln", "log", "lg", "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh",
                     "arcsin", "arccos", "arctan"), _final_function)}
