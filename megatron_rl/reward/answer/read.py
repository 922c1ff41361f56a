"""What an answer is: its readings, each of one kind. Reading only computes whether a number has a value."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.reward.answer import units, words
from megatron_rl.reward.answer.formula import Node, names, read_formula
from megatron_rl.reward.answer.latex import OPEN, Unreadable, closing, plain, undress
from megatron_rl.reward.answer.value import value

__all__ = [
    "Answer", "Rules", "TURNED", "has_unit", "is_name", "is_undone", "read", "read_number", "read_one",
    "read_reference"]

_SETS = {**dict.fromkeys(("all real numbers", "all reals", "all real"), "\\mathbb{R}"),
         **dict.fromkeys(("no solution", "no solutions", "empty set", "the empty set"), "\\emptyset")}
INFINITY = Node("const", ("inf",))
TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
_UNDONE = re.compile(r"\\(?:int|iint|iiint|oint|sum|prod|lim|bigcup|bigcap)(?![A-Za-z])")
_AND_OR = re.compile(
    r"\\text\{\s*(?:and|or|to)\s*\}|(?<=\s)to(?=\s+\d)|(?<=\s)(?:and|or)(?=\s)|\\(?:lor|vee|cup|land|wedge)(?![A-Za-z])")
_JOIN = re.compile(f"[,;]|{_AND_OR.pattern}")
_INTRODUCED = re.compile(r"^(?:=|\\(?:approx|simeq|sim|therefore)(?![A-Za-z]))\s*(?=\S)")
_ANY_WHOLE = re.compile(
    r"[\s,;(]*(?:\\text\{\s*(?:for|where|with)(?: (?:any|all|some|every))?(?: integers?)?\s*\}\s*)?"
    r"(?<![A-Za-z\\])([a-z])\s*(?:\\in\s*\\mathbb\s*\{?Z\}?|\\text\{\s*is an integer\s*\})\s*\)?$")
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|equiv)(?![A-Za-z])|[=<>]")
_NAME = re.compile(r"(?:[A-Za-z]|\\(?!pi(?![A-Za-z])|infty|frac|sqrt|cdot|int|sum|text\{\s*\})[A-Za-z]+)"
                   r"[A-Za-z0-9_{}\\' ]*(?:\^\{?-1\}?)?(?:\([A-Za-z0-9,\\ ]*\))?|\([A-Za-z]\s*(?:,\s*[A-Za-z]\s*)+\)")
_MATRIX = re.compile(r"\\begin\{(?:[pbB]|small)?matrix\}(.*)\\end\{(?:[pbB]|small)?matrix\}", re.DOTALL)
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")

@dataclass(frozen=True)
class Rules:
    """tolerance: relative, for measured numbers (decimals, and numbers with a unit); None: every number is exact.

    letters: whether letters behind a number may be a unit: 5m.
    """

    tolerance: float | None = None
    letters: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer that was read. kind: number, formula, list, pair, relation, matrix, ratio, clock, based, words, text.

    parts, by kind:

    - number: its tree and unit. formula: its tree. list, matrix, ratio: its items.
    - pair (tuple, interval or vector): opening bracket, items, closing bracket.
    - relation: its sign and its two sides as texts. clock, based, words, text: what it is.

    name: x if it was written as x in ...; for an interval, x if it was written as an inequality of x; for a list, "and"
    if that joins it.
    """

    kind: str
    parts: tuple[Any, ...]
    name: str = ""


def read_reference(text: str, rules: Rules) -> list[Answer]:
    """The readings of a reference. Unreadable, with the reason, if no right answer could meet it."""
    readings = read(text, rules)
    if any(reading.kind == "text" and _UNDONE.search(reading.parts[0]) and _is_closed(reading.parts[0])
           for reading in readings):
        raise Unreadable("it is not worked out, and no answer that is would be known as right")
    return readings


def has_unit(readings: list[Answer]) -> bool:
    """Whether a reading is a number with a unit, also after a name."""
    return any((each.kind == "number" and each.parts[1]) or (
        each.kind == "relation" and units.split_unit(each.parts[2], letters=False)) for each in readings)


def is_undone(text: str) -> bool:
    """Whether no answer may be able to meet a reference. It is quick, and also true for some that can be met."""
    return _UNDONE.search(text) is not None or re.search(r"[A-Za-z0-9]", text.replace("\\text", "")) is None


def _is_closed(text: str) -> bool:
    """Whether an integral, sum or limit binds all of its letters, so that it stands for a number."""
    bound = {name for pair in re.findall(r"d\s*([a-z])(?![a-z])|_\{?\s*([a-z])\s*(?:=|\\to)", text) for name in pair}
    letters = re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|d\s*[a-z](?![a-z])", "", text))
    return set(letters) <= bound | {"e", "i"}


def read(text: str, rules: Rules) -> list[Answer]:
    """Everything that an answer can mean, the likeliest first: 100,200 is a number and a list.

    Unreadable if it is nothing.
    """
    text = _exact_side(_without_domain(_INTRODUCED.sub("", undress(text))), rules)
    if rules.tolerance is not None:
        text = re.sub(r"(?<=\d)e(?=-?\d)", "E", text)  # 5e-6 m is no 5 e - 6 m
    whole = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if re.search("[(\\[{\u27e6]", text):
        whole = text  # (1,234) is a pair
    readings = _read(whole, rules)
    return readings if whole == text else [*readings, *_read(text, rules)]


def _without_domain(text: str) -> str:
    """The text without ", k\\in\\mathbb{Z}" at its end, which some write behind 2k\\pi and others leave out."""
    match = _ANY_WHOLE.search(text)
    return text[:match.start()] if match and match[1] in text[:match.start()] else text


def _exact_side(text: str, rules: Rules) -> str:
    """What stands before \\approx and a number, if that is its value within 5%: sqrt(13) of sqrt(13) \\approx 3.6."""
    exact, sign, near = text.rpartition("\\approx")
    if not sign or is_name(exact.strip()):
        return text
    sides = [read_one(side, rules) for side in (exact, near)]
    numbers = [read_number(side.parts[2]) if side.kind == "relation" else side.parts[0] for side in sides
               if side.kind in ("number", "relation")]
    if len(numbers) < 2 or None in numbers:
        return text
    found, wanted = (float(value(number)) for number in numbers)
    return exact.strip() if abs(found - wanted) <= 0.05 * abs(wanted) else text


def _read(text: str, rules: Rules) -> list[Answer]:
    for kind, reader in (("clock", words.clock), ("based", words.based)):
        found = reader(text)
        if found is not None:
            return [Answer(kind, (found,))]
    if words.is_words(text):
        meant = _SETS.get(plain(text).casefold())
        return [Answer("words", (text,)), *(_read(meant, rules) if meant else [])]
    try:
        return _list(text, rules) or _pair(text, rules) or _relation(text, rules) or _matrix(text, rules) \
            or _ratio(text) or _quantity(text, rules)
    except Unreadable:
        return [Answer("text", (text,))]


def read_one(text: str, rules: Rules) -> Answer:
    """The likeliest reading of a part of an undressed text."""
    return _read(text.strip(), rules)[0]


def is_name(text: str) -> bool:
    """Whether the left side of an equation only names the right side: x, f(x), \\angle ABC, P(A), (x,y)."""
    return _NAME.fullmatch(text) is not None


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The pieces between separators outside of all brackets, and the separators."""
    pieces, signs, start, place = [], [], 0, 0
    while place < len(text):
        character = text[place]
        match = separator.match(text, place)
        if match is not None and match.end() > place:
            pieces.append(text[start:place])
            signs.append(match[0])
            start = place = match.end()
        elif text.startswith("\\begin", place):
            place = max(text.rfind("\\end", place), place + 1)
        elif character in OPEN:
            place = closing(text, place) + 1
        else:
            place += 1
    return [*pieces, text[start:]], signs


def _list(text: str, rules: Rules) -> list[Answer]:
    if text == "\\emptyset":
        return [Answer("list", ())]
    if text.startswith("\u27e6") and closing(text, 0) == len(text) - 1:
        inner = text[1:-1].strip()
        built = re.fullmatch(r"([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?[|:](.*)", inner)
        if built:
            return [replace(read_one(built[2], rules), name="")]
        items = _items(inner, rules)
        return [Answer("list", tuple(items))]
    pieces, signs = _split(text, _JOIN)
    pieces = [piece for piece in pieces if piece.strip()]
    if signs and len(pieces) > 1:
        joined = "and" if any("and" in sign or "wedge" in sign for sign in signs) else ""
        return [Answer("list", tuple(_items(text, rules)), joined)]
    if len(re.findall(r"\\(?:pm|mp)(?![A-Za-z])", text)) == 1 and not _RELATION.search(text):
        return [Answer("list", tuple(_both(text, rules)))]
    return []


def _items(text: str, rules: Rules) -> list[Answer]:
    found = []
    for piece in _split(text, _JOIN)[0]:
        if piece.strip():
            two = re.search(r"\\(?:pm|mp)(?![A-Za-z])", piece)
            found += _both(piece.strip(), rules) if two else [read_one(piece, rules)]
    return found


def _both(text: str, rules: Rules) -> list[Answer]:
    start = re.sub(r"^(.*?=)?\s*\\(?:pm|mp)", "", text)
    if start != text:
        return [read_one(sign + start, rules) for sign in ("", "-")]
    return [read_one(re.sub(r"\\(?:pm|mp)(?![A-Za-z])", sign, text), rules) for sign in ("+", "-")]


def _pair(text: str, rules: Rules) -> list[Answer]:
    if text == "\\mathbb{R}":
        return [Answer("pair", ("(", (_infinite(-1), _infinite(1)), ")"))]
    if text[:1] in "([" and text[:1] and closing(text, 0) == len(text) - 1:
        pieces, signs = _split(text[1:-1], re.compile("[,;]"))
        if signs:
            return [Answer("pair", (text[0], tuple(read_one(piece, rules) for piece in pieces), text[-1]))]
        if re.fullmatch(r"[A-Za-z]+|[^()]*[A-Za-z]{4,}[^()]*", text[1:-1].strip()) is None and text[0] == "(":
            return _read(text[1:-1].strip(), rules)
    return []


def _infinite(sign: int) -> Answer:
    return Answer("number", (INFINITY if sign > 0 else Node("neg", (INFINITY,)), ""))


def _relation(text: str, rules: Rules) -> list[Answer]:
    sides, signs = _split(text, _RELATION)
    sides = [side.strip() for side in sides]
    if not signs:
        return []
    if not all(sides):
        raise Unreadable("a relation lacks a side")
    if signs == ["\\in"]:
        return [replace(read_one(sides[1], rules), name=plain(sides[0]))]
    interval = _interval(sides, signs, rules)
    if interval is not None:
        return [interval]
    if len(signs) > 1:  # b>a>c is c<a<b
        turn = all(sign in (">", "\\ge") for sign in signs)
        pieces = [*sides, *(TURNED[sign] for sign in signs)][::-1] if turn else [*signs, *sides]
        return [Answer("text", (" ".join(pieces),))]
    if signs == ["="] and is_name(sides[1]) and not is_name(sides[0]):
        sides.reverse()
    return [Answer("relation", ("=" if signs[0] == "\\approx" else signs[0], *sides))]


def _interval(sides: list[str], signs: list[str], rules: Rules) -> Answer | None:
    """a < x <= b, or a part of it, as an interval; None for other relations."""
    if any(sign not in ("<", ">", "\\le", "\\ge") for sign in signs) or len(sides) > 3:
        return None
    read_sides = [read_one(side, rules) for side in sides]
    middle = [i for i, side in enumerate(read_sides) if side.kind == "formula" and side.parts[0].op == "sym"]
    if len(middle) != 1 or any(side.kind != "number" for i, side in enumerate(read_sides) if i != middle[0]) \
            or (len(sides) == 3 and middle != [1]):
        return None
    low, high, opening, closing_ = _infinite(-1), _infinite(1), "(", ")"
    for sign, left, right in zip(signs, range(len(sides)), range(1, len(sides)), strict=False):
        other, up = (read_sides[left], sign) if right == middle[0] else (read_sides[right], TURNED[sign])
        if up in ("<", "\\le"):
            if low != _infinite(-1):
                return None
            low, opening = other, "[" if up == "\\le" else "("
        else:
            if high != _infinite(1):
                return None
            high, closing_ = other, "]" if up == "\\ge" else ")"
    return Answer("pair", (opening, (low, high), closing_), sides[middle[0]])


def _matrix(text: str, rules: Rules) -> list[Answer]:
    match = _MATRIX.fullmatch(text)
    if match is None:
        return []
    rows = [row for row in re.split(r"\\\\", match[1]) if row.strip()]
    return [Answer("matrix", tuple(tuple(read_one(cell, rules) for cell in row.split("&")) for row in rows))]


def _ratio(text: str) -> list[Answer]:
    pieces, signs = _split(text, re.compile(":"))
    if not signs:
        return []
    return [Answer("ratio", tuple(read_formula(piece) for piece in pieces))]


def _quantity(text: str, rules: Rules) -> list[Answer]:
    """A number with a unit if possible, else a number or a formula. A letter may be a unit or a variable (5m)."""
    readings = []
    letters = rules.letters or rules.tolerance is not None
    parted = units.split_unit(text, letters=letters)
    if parted is not None:
        number = read_number(parted[0])
        if number is not None and (not letters or "\\text" in parted[1] or units.is_unit(parted[1])):
            readings.append(Answer("number", (number, parted[1])))
            if re.search(r"[A-Za-z]{2}|%", parted[1]) or text[text.index(parted[1]) - 1] == " ":
                return readings
    try:
        node = read_formula(text)
    except Unreadable:
        if readings:
            return readings
        raise
    if names(node):
        return [*readings, Answer("formula", (node,))]
    value(node)  # Unreadable without one: 1/0
    return [Answer("number", (node, ""))]


def read_number(text: str) -> Node | None:
    """The tree of a closed form without variables; None for anything else."""
    try:
        node = read_formula(_THOUSANDS.sub(lambda match: match[0].replace(",", ""), text))
    except Unreadable:
        return None
    return node if not names(node) else None
