"""Answers that are not algebra: words, letters, orders, acronyms, chemistry, clock times, numbers in a base."""

from __future__ import annotations

import re

from megatron_rl.reward.answer.latex import plain

__all__ = ["based", "clock", "final_letter", "is_choice", "is_words", "same_clock", "same_words"]

_ELEMENTS = frozenset(
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au "
    "Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts "
    "Og".split())
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_SENTENCE = re.compile(r"""[^\W\d_][^\W\d_'"()/,;:.!?\s-]*(?:[\s'"()/,;:.!?-]+[^\W\d_'"()/,;:.!?\s-]+)*[\s'"().!?]*""")
_COMPOUND = re.compile(r"\d*(?:(?:[A-Z][a-z]?|\([A-Za-z0-9]+\)|\[[A-Za-z0-9()]+\])\d*)+(?:\^\d*[+-]|[+-])?"
                       r"(?:\((?:aq|s|l|g)\))?")
_CHARGED = re.compile(r"(?:\\?[A-Za-z]+)\d*\^\d*[+-]")
_SHELLS = re.compile(r"(?:\[[A-Z][a-z]?\])?(?:\d[spdf]\^?\d{1,2})+")
_ARROW = re.compile(r"\\(?:to|rightleftharpoons|leftrightarrow|longleftrightarrow)(?![A-Za-z])\s*")
_DATE = re.compile(r"[A-Za-z]{3,}\.?(?: [A-Za-z0-9]+,?)+")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
          "eleven": 11, "twelve": 12, "sixteen": 16}
_BASED = re.compile(rf"\(?([0-9A-Za-z]+)\)?\s*(?:_\s*(?:base )?|\(?(?:in )?base[ -])(\d{{1,2}}|{'|'.join(_BASES)})\)?")
_INTRODUCTION = re.compile(
    r"^(?:so |therefore,? |thus,? |hence,? )?(?:the |my )?(?:final |correct |right )?(?:answer|option|choice)"
    r"(?: is|:)?:?\s*(?:option |choice )?", re.IGNORECASE)
_LABEL = re.compile(r"[A-J]")
_CHOICE = re.compile(r"(?:option|choice|answer)?\s*(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:]|([A-J])$)\s*(.*)",
                     re.IGNORECASE | re.DOTALL)


def is_words(text: str) -> bool:
    """Whether an undressed answer is text and not algebra.

    A run of letters alone is text, unless it is a product such as xy: two small letters without e, i, o, u, or three
    without a vowel, one of them beyond h (orders of options begin at a).
    """
    said = plain(text)
    run = said.replace(" ", "")
    if re.fullmatch(r"[A-Za-z]+", run) and (run == said or all(len(word) == 1 for word in said.split())):
        return _LABEL.fullmatch(run) is not None or (len(run) > 1 and not _is_product(run))
    if _SENTENCE.fullmatch(said) and max(map(len, _WORD.findall(said))) > 1:
        return True
    return _DATE.fullmatch(said) is not None or _is_chemistry(run, said)


def _is_product(run: str) -> bool:
    if not run.islower():
        return False
    return (len(run) == 2 and not set(run) & set("eiou")) or (
        len(run) == 3 and not set(run) & set("aeiou") and max(run) > "h")


def _is_chemistry(run: str, said: str) -> bool:
    if _ARROW.search(said):
        return "\\lim" not in said
    if _SHELLS.fullmatch(run) or _CHARGED.fullmatch(_charge(run)):
        return True
    terms = [_charge(term) for term in _terms(run)]
    return all(_is_compound(term) for term in terms) and not re.search(r"_[01](?!\d)", run)


def _is_compound(term: str) -> bool:
    """Whether it has more than one element, or a number of one. C alone stands for a carbon atom and for a capacity."""
    bare = term.replace("_", "")
    symbols = re.findall(r"[A-Z][a-z]?", re.sub(r"\((?:aq|s|l|g)\)$", "", bare))
    return _COMPOUND.fullmatch(bare) is not None and all(symbol in _ELEMENTS for symbol in symbols) \
        and "^" not in re.sub(r"\^\d*[+-]", "", bare) and (
            len(symbols) > 1 or re.search(r"[A-Za-z)]_?\d|[+-]", term) is not None)


def same_words(answer: str, wanted: str) -> bool:
    """Whether two undressed texts say the same, letter by letter, apart from markup and white space.

    The case of an ordinary word does not count (yes, Yes), that of a symbol does (Co, CO). A letter from A to J is a
    choice: (A), A. and "A) newton" mean it too.
    """
    said, asked = plain(answer), plain(wanted)
    if is_choice(asked):
        return _chosen(_INTRODUCTION.sub("", said)) == asked.strip("()")
    return _spelling(said) == _spelling(asked)


def is_choice(wanted: str) -> bool:
    """Whether a reference is the letter of an option: A to J, alone or in brackets."""
    return re.fullmatch(r"\(?[A-J]\)?", wanted) is not None


def final_letter(response_text: str) -> str | None:
    """What the last line of a response chooses: A, (A), "A) newton", "The answer is A."; None if it chooses nothing."""
    lines = response_text.strip().splitlines()
    line = re.sub(r"[*`$]", "", lines[-1]).strip() if lines else ""
    line = _INTRODUCTION.sub("", line)
    return _chosen(line)


def _chosen(said: str) -> str | None:
    """The letter that an answer chooses; None if it chooses none, or names a second one."""
    match = _CHOICE.fullmatch(said.strip(" .,;"))
    if match is None or re.search(r"(?:^|[\s(,])[A-J](?:[).:,;]|$)|\b(?:and|or)\s+\(?[A-HJ]\b", match[4]):
        return None
    letter = match[1] or match[2] or match[3]
    return letter if letter.isupper() else None


def _spelling(said: str) -> str:
    if _ARROW.search(said):
        arrow = _ARROW.search(said)
        sides = ("+".join(sorted(map(_charge, _terms(side.replace(" ", "")))))
                 for side in _ARROW.split(said))
        return arrow[0].strip().join(sides).replace("_", "") if arrow else said
    if _SENTENCE.fullmatch(said) and not _is_chemistry(said.replace(" ", ""), said):
        found = [word.casefold() if _is_ordinary(word) else word for word in _WORD.findall(said)]
        return ("" if all(len(word) == 1 for word in found) else " ").join(found)
    bare = re.sub(r"\\cdot(?![A-Za-z])|\s", "", said)
    return "+".join(sorted(map(_charge, _terms(bare)))).replace("_", "") if _is_chemistry(bare, said) else bare


def _is_ordinary(word: str) -> bool:
    shape = word.islower() or (word[:1].isupper() and word[1:].islower())
    return word.casefold() in ("yes", "no", "true", "false", "none") or (shape and len(word) > 2)


def _terms(run: str) -> list[str]:
    """The terms of a sum of compounds. The sign of a charge does not separate terms."""
    return re.split(r"(?<![\^\d])\+(?=\d*[\[(A-Z\\])|(?<=[A-Za-z)\]]\d)\+(?=\d*[\[(A-Z\\])|"
                    r"(?<=[A-Za-z]_\d)\+(?=\d*[\[(A-Z\\])", run)


def _charge(term: str) -> str:
    """One way to write a charge: Fe^3+ for Fe^{+3}, Na^+ for Na+."""
    term = re.sub(r"^(.*[A-Z].*)\^([+-])(\d+)$", r"\1^\3\2", term)
    return re.sub(r"(?<=[A-Za-z)\]])([+-])$", r"^\1", term)


def clock(text: str) -> tuple[int, int, int, str] | None:
    """(hour, minute, second, a or p or nothing) of a time of day; None for anything else."""
    match = _CLOCK.fullmatch(plain(text))
    if match is None or not (match[2] or match[4]) or int(match[1]) > 24 or int(match[2] or 0) > 59:
        return None
    return int(match[1]), int(match[2] or 0), int(match[3] or 0), (match[4] or "").lower()


def same_clock(found: tuple[int, int, int, str], wanted: tuple[int, int, int, str]) -> bool:
    """Whether the times are equal.

    A reference that names the half of the day needs it, or the hour of 24; others accept both.
    """
    if not wanted[3]:
        return found[:3] == wanted[:3] or _of_24(found) == wanted[:3]
    return _of_24(found) == _of_24(wanted)


def _of_24(time: tuple[int, int, int, str]) -> tuple[int, int, int]:
    hour = time[0] % 12 + 12 * (time[3] == "p") if time[3] else time[0]
    return hour, time[1], time[2]


def based(text: str) -> tuple[str, int] | None:
    """(digits, base) of a number with its base, such as 1011_2 or "1011 (base 2)"; None for anything else."""
    match = _BASED.fullmatch(plain(text))
    if match is None:
        return None
    base = _BASES.get(match[2]) or int(match[2])
    digits = match[1].upper()
    if not 2 <= base <= 36 or not (digits[0].isdigit() or (base > 10 and len(digits) > 1)):
        return None
    return digits.lstrip("0") or "0", base
