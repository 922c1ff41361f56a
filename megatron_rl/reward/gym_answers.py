"""Which answers the checker of a reasoning-gym task (0.1.25) gets to see.

Several checkers give full marks to nan, to a prefix of the answer or to any text that holds it. Several call eval() on
the answer. So an answer is right if it is the reference. Only the tasks of CHECKED ask their checker, because they have
more than one right answer or more than one way to write it, and only for answers of the given shape. The tasks of OWN
are judged here, because their checkers accept wrong answers of the right shape.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

__all__ = ["CHECKED", "OWN", "expression", "fits", "is_reference"]

ANSWER_CHARACTERS = 2000  # beside twenty times what the reference has
_PLAIN = r"[+-]?(?:[0-9]{1,60}(?:\.[0-9]{0,60})?|\.[0-9]{1,60})"
_NUMBER = rf"(?:{_PLAIN}|[+-]?[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,20}}(?:\.[0-9]{{0,60}})?)"
_MOVE, _SQUARE = r"Move disk [0-9]+ from Peg [0-9]+ to Peg [0-9]+", r"[A-Z][0-9]{1,2}"
_ROLE = r"[A-Z][A-Za-z]* is an? [a-z-]+"
_WAY = r"(?:up|down|left|right)"


def _separated(item: str, by: str) -> str:
    return rf"{item}(?:{by}{item})*"


def _json_list(item: str) -> str:
    return rf'\[\s*"{item}"(?:\s*,\s*"{item}")*\s*\]'


CHECKED: Mapping[str, re.Pattern[str]] = {task: re.compile(shape) for task, shape in {
    "advanced_geometry": rf"{_PLAIN}\s*\u00b0?|\(\s*{_PLAIN}\s*,\s*{_PLAIN}\s*\)",
    "bitwise_arithmetic": r"[+-]?(?:0x[0-9a-fA-F]{1,200}|[0-9]{1,200})",
    "boxnet": r'\[[\s{}A-Za-z0-9\[\](),.:"_]*\]',
    **dict.fromkeys(("calendar_arithmetic", "chain_sum", "decimal_arithmetic", "decimal_chain_sum", "number_format",
                     "power_function", "products", "rectangle_count"), _NUMBER),
    "complex_arithmetic": r"[0-9ij+\-.() ]{1,80}",
    "cryptarithm": _separated(r"[A-Z]\s*=\s*[0-9]", r"\s*,\s*"),
    "fraction_simplification": r"\$?\s*(?:\\d?frac\s*\{[0-9]+\}\s*\{[0-9]+\}|[0-9]+\s*/\s*[0-9]+)\s*\$?",
    "graph_color": r'\{(?:\s*"[0-9]+"\s*:\s*[0-9]+\s*,?)+\s*\}',
    "group_anagrams": r'\[[\s\[\]",A-Za-z]*\]',
    "intermediate_integration": "",  # see expression()
    "jugs": _json_list(r"[a-z]+ [A-Z](?:->[A-Z])?"),
    "kakurasu": r"[01\s]+",
    "knight_swap": _json_list(f"[wB],{_SQUARE},{_SQUARE}"),
    "knights_knaves": _separated(_ROLE, r"(?:, and |, | and )") + r"\.?",
    "n_queens": r"[Q_\s]+",
    "palindrome_generation": r"[A-Za-z]+",
    "palindrome_partitioning": r'\[[\s\[\]",A-Za-z]*\]',
    "polynomial_equations": _separated(_PLAIN, r"\s*,\s*"),
    "polynomial_multiplication": "",
    "pool_matrix": r"[0-9.\s-]+",
    "prime_factorization": _separated("[0-9]+", r"\s*\u00d7\s*"),
    "quantum_lock": r"[A-Ca-c\s,>\u2192\[\]'-]+",
    "rubiks_cube": _separated("[UDFBLR]'?", r"\s+"),
    "rush_hour": _separated("[A-Z][+-][0-9]", r"\s+"),
    "shortest_path": _separated(_WAY, r"\s+"),
    "simple_integration": "",
    "sokoban": r"[UDLR]+",
    "time_intervals": "",  # see fits()
    "tower_of_hanoi": _separated(_MOVE, r"\s*\n\s*"),
    "word_ladder": _separated("[A-Za-z]+", r"\s*,\s*"),
    "word_sorting": r"[^\n]+",
}.items()}
"""Task -> the shape of an answer that its checker may see, from the first character to the last."""

CASE_FREE = frozenset({"acre", "calendar_arithmetic", "color_cube_rotation", "dice", "family_relationships",
                       "figlet_font", "game_of_life_halting", "knight_swap", "letter_jumble", "needle_haystack",
                       "spell_backward", "tsumego", "zebra_puzzles"})
_EXPRESSIONS = frozenset({"intermediate_integration", "polynomial_multiplication", "simple_integration"})
_FUNCTIONS = frozenset({"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp",
                        "log", "ln", "sqrt", "pi", "E", "C"})
_TOKENS = re.compile(r"(?:\s|[0-9]{1,40}(?:\.[0-9]{1,40})?(?![0-9.])|[A-Za-z]+|[-+*/()])+")


def is_reference(task: str, answer: str, reference: str) -> bool:
    """Whether the answer is the reference: line by line, blanks counted once, with or without case as the task says."""
    both = [[" ".join(line.split()) for line in text.splitlines() if line.strip()] for text in (answer, reference)]
    if task in CASE_FREE:
        both = [[line.casefold() for line in lines] for lines in both]
    return bool(both[0]) and both[0] == both[1]


def fits(task: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether the checker of the task may see the answer."""
    if task not in CHECKED or len(answer) > ANSWER_CHARACTERS + 20 * len(entry["answer"] or ""):
        return False
    if task in _EXPRESSIONS:
        return expression(answer, entry["answer"])
    if task == "time_intervals":  # its checker looks for days where it wants days, whatever else the answer says
        return re.fullmatch(re.sub("[0-9]+", "[0-9]{1,9}", re.escape(entry["answer"])), answer) is not None
    return CHECKED[task].fullmatch(answer) is not None


def expression(answer: str, reference: str) -> bool:
    """Whether sympy may parse the answer, which it does with eval(): numbers, + - * / ( ), known functions, and the
    names of the reference. No dot but a decimal point, no bracket, quote or underscore."""
    if _TOKENS.fullmatch(answer) is None:
        return False
    return set(re.findall("[A-Za-z]+", answer)) <= _FUNCTIONS | set(re.findall("[A-Za-z]+", reference))


def _number(text: str) -> Fraction | None:
    return Fraction(text.replace(",", "")) if re.fullmatch(_NUMBER, text) else None


def _same_number(answer: str, entry: Mapping[str, Any]) -> bool:
    """The reference as a number. (gsm_symbolic's checker takes the first number of any text, without its sign.)"""
    return _number(answer) is not None and _number(answer) == _number(entry["answer"])


def _probability(answer: str, entry: Mapping[str, Any]) -> bool:
    """A decimal or a fraction, off by at most 0.0001 and 1%. (coin_flip's checker takes every prefix: 0 for 0.375.)"""
    parts = [_number(part.strip()) for part in answer.split("/")]
    if len(parts) > 2 or None in parts or (len(parts) == 2 and parts[1] == 0):
        return False
    found, wanted = parts[0] / (parts[1] if len(parts) == 2 else 1), Fraction(entry["answer"])
    return abs(found - wanted) <= min(Fraction(1, 10000), wanted / 100)


def _makes(answer: str, numbers: list[int], target: int) -> bool:
    """Whether the sums, differences, products and quotients of exactly these numbers are the target."""
    if re.fullmatch(r"[0-9+\-*/() ]{1,300}", answer) is None:
        return False
    used: list[int] = []
    try:
        value = _value(ast.parse(answer.strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return value == target and sorted(used) == sorted(numbers)


def _value(node: ast.expr, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(int() as number):
            used.append(number)
            return Fraction(number)
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, used)
        case ast.BinOp(left, operator, right):
            a, b = _value(left, used), _value(right, used)
            match operator:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
    raise ValueError("something else than + - * / of whole numbers")


def _json_of(text: str, shape: str) -> Any:
    """The JSON value of a text of that shape, None without one."""
    try:
        return json.loads(text) if re.fullmatch(shape, text) else None
    except (ValueError, RecursionError):
        return None


def _same_grid(answer: str, entry: Mapping[str, Any]) -> bool:
    """The same rows of 0 and 1. (game_of_life's checker looks at a part of a larger grid, and accepts true for 1.)"""
    return _json_of(answer, r"[\[\]01,\s]+") == json.loads(entry["answer"])


def _same_list(answer: str, entry: Mapping[str, Any]) -> bool:
    """The same numbers in the same order. (number_sorting's checker allows each to be off by 1.)"""
    lists = [_json_of(text.replace("'", '"'), rf'\[\s*"?{_PLAIN}"?(?:\s*,\s*"?{_PLAIN}"?)*\s*\]')
             for text in (answer, entry["answer"])]
    return None not in lists and [Fraction(str(n)) for n in lists[0]] == [Fraction(str(n)) for n in lists[1]]


OWN: Mapping[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "coin_flip": _probability,
    "countdown": lambda answer, entry: _makes(answer, entry["metadata"]["numbers"], entry["metadata"]["target"]),
    "game_of_life": _same_grid,
    "gsm_symbolic": _same_number,
    "number_sorting": _same_list,
    # its checker takes any four numbers that make 24, whatever the problem's are, and 24.9 for 24
    "puzzle24": lambda answer, entry: _makes(answer, entry["metadata"]["numbers"], 24),
}
"""Task -> whether an answer that is not spelled like the reference is right."""
