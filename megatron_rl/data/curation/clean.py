"""Rule-based cleansing (Sec. 2.3): removes problems that a rule-based verifier cannot judge, or that are incomplete."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from megatron_rl.data.curation.items import Item, Removal, Split, problem_text

__all__ = ["RULES", "clean", "objection"]

_PICTURE = r"(?:figure|diagram|picture|illustration)"
_IMAGE = re.compile(
    r"!\[[^\]]{0,300}\]\(|<img\b|\\includegraphics|\[asy\]|\[img\]|https?://\S{1,300}?\.(?:png|jpe?g|gif|svg)\b"
    r"|\b(?:figure|diagram|picture|image|graph|chart|drawing|illustration)s?\s{1,3}(?:is\s|are\s)?\s{0,3}"
    r"(?:(?:below|above)(?!\s+(?:the|an?|its|this|that|zero|\$?[xy\d]))|shown|at\s+(?:the\s+)?(?:right|left))"
    r"|\b(?:in|from|see|on|to)\s+(?:the|this|adjacent)\s+(?:(?:adjacent|following|accompanying|attached)\s+)?"
    rf"{_PICTURE}\b(?!\s+(?:\$?\d|book|frame|skat|eight|of\s))"
    r"|\bas\s+(?:is\s+)?(?:shown|pictured|illustrated)\b(?!\s+(?:by|earlier|before|previously)\b)"
    r"|\bpictured\b(?!\s+(?:in|with|on|as)\b)",
    re.IGNORECASE)
_OF_AN_IMAGE = re.compile(rf"\bof\s+(?:the|this)\s+(?:\w+\s)?{_PICTURE}\b", re.IGNORECASE)
_OPTIONS = re.compile(r"(?:^|[\s$~])(?:\\(?:text|textbf|mathrm|mathbf)\s?\{)?\(?([A-E])(?:\)\s?\}|[).:])", re.MULTILINE)
_SMALL_OPTIONS = re.compile(r"(?:^|\s)\(([a-e])\)\s", re.MULTILINE)
_ASKS_TO_CHOOSE = re.compile(r"\bwhich (?:one )?of (?:the following|these)\b|\b(?:choose|select) the (?:correct|best)\b"
                             r"|\b(?:multiple|single)[- ]choice\b(?! (?:tests?|exams?|quiz|quizzes|papers?))",
                             re.IGNORECASE)
_COUNTS = re.compile(r"\bhow many\b|\bnumber of\b|\bprobability\b|\bin what ways\b", re.IGNORECASE)
_TRUE_FALSE = re.compile(r"\btrue or false\b|\btrue\s?/\s?false\b|\b(?:yes or no|yes/no)\b"
                         r"|\b(?:is|are) (?:this|it|the (?:following )?statements?) (?:true|false|correct)\b",
                         re.IGNORECASE)
_TRUTH_VALUES = {"true", "false", "yes", "no", "correct", "incorrect", "right", "wrong"}
_ASKS_FOR_A_NAME = re.compile(r"\b(?:which|what|who|whose|where)\b", re.IGNORECASE)
_LETTER = re.compile(r"\(?[A-E]\)?\.?")
_SEVERAL = re.compile(r"[,;\n]|\band\b|\([a-z]\)")
_NUMBERED = re.compile(r"^[ \t]{0,20}(\d)[.)]\s", re.MULTILINE)
_PARTS = (re.compile(r"(?:^|\s)\(([a-h])\)\s", re.MULTILINE),
          re.compile(r"(?:^|\s)\((i{1,3}|iv|v)\)\s", re.MULTILINE),
          _NUMBERED, _NAMED := re.compile(r"\bpart\s+\(?([A-D1-4])\)?", re.IGNORECASE))
_TASK = re.compile(r"\b(?:find|prove|show|determine|compute|calculate|evaluate|solve|what|how|sketch|express|write|"
                   r"explain|deduce|estimate|verify|hence)\b|\?", re.IGNORECASE)
_NO_ANSWER = re.compile(r"^(?:n/?a|null|nan|unknown|no answer|see (?:the )?(?:solution|above|below)|"
                        r"answers? (?:may )?var(?:y|ies)|proof|omitted|-+|\?+|\.+)\.?$", re.IGNORECASE)
_NONE = re.compile(r"none\.?", re.IGNORECASE)
_MAY_HAVE_NONE = re.compile(r"\bwhich\b|\bwhat\b|\ball\b|\bhow many\b|\bsolutions?\b|\bsolve\b|\bis there\b|\bsigns?\b",
                            re.IGNORECASE)
_PROOF = re.compile(r"\b(?:prove|show) that\b|\bgive a proof\b|\bprove\b[^.?]*[.]?\s*$", re.IGNORECASE)
_NUMERIC_TASK = re.compile(r"\b(?:find|determine|compute|calculate|evaluate|what|how (?:many|much|long|far)|"
                           r"give (?!a proof)|state the|value of)\b", re.IGNORECASE)


def clean(items: Sequence[Item]) -> Split:
    """Removes problems that a rule of RULES rejects; the first such rule is the reason."""
    objections = {place: objection(item) for place, item in enumerate(items)}
    return Split(items, {place: removal for place, removal in objections.items() if removal is not None})


def objection(item: Item) -> Removal | None:
    text, answer = problem_text(item.problem), item.problem.answer.strip()
    for why, rule in RULES.items():
        if found := rule(text, answer):
            return Removal(why, found[:200])
    return None


def _bad_characters(text: str, answer: str) -> str | None:
    for character in text + answer:
        category = unicodedata.category(character)
        if character == "\ufffd" or category in ("Co", "Cn", "Cs") or (category == "Cc" and character not in "\n\r\t"):
            return f"U+{ord(character):04X}"
    return None


def _image(text: str, answer: str) -> str | None:
    found = _IMAGE.search(text)
    if found is None and not re.search(r"[\d=]", text):  # nothing is given, so the picture gives it
        found = _OF_AN_IMAGE.search(text)
    return found and found.group().strip()


def _no_answer(text: str, answer: str) -> str | None:
    missing = not answer or (_NO_ANSWER.match(answer) and not (answer == "-" and _MAY_HAVE_NONE.search(text)))
    missing = missing or (_NONE.fullmatch(answer) and not _MAY_HAVE_NONE.search(text))
    return f"answer {answer!r}" if missing else None


def _true_false(text: str, answer: str) -> str | None:
    found = _TRUE_FALSE.search(text)
    if answer.casefold().strip(".$ ") in _TRUTH_VALUES and (found or not _ASKS_FOR_A_NAME.search(text)):
        return f"answer {answer!r}"
    return found.group() if found and not _NUMERIC_TASK.search(text) and not _COUNTS.search(text) else None


def _multiple_choice(text: str, answer: str) -> str | None:
    if (found := _ASKS_TO_CHOOSE.search(text)) and not _COUNTS.search(text):
        return found.group()
    labels, segments = "".join(_OPTIONS.findall(text)), _segments(_OPTIONS, text)
    if "ABC" in labels and (_LETTER.fullmatch(answer) or not _TASK.search(segments[-1])):
        return f"options {', '.join(labels)}"
    labels = "".join(_SMALL_OPTIONS.findall(text))  # which also label parts; those have tasks of their own
    tasks = any(_TASK.search(segment) for segment in _segments(_SMALL_OPTIONS, text)[1:])
    return f"options {', '.join(labels)}" if "abc" in labels and not tasks else None


def _multi_part(text: str, answer: str) -> str | None:
    for pattern in _PARTS:
        if pattern in (_NUMBERED, _NAMED) and not _SEVERAL.search(answer):  # steps, rules or parts of a thing
            continue
        segments = _segments(pattern, text)
        if len(segments) > 2 and sum(bool(_TASK.search(segment)) for segment in segments[1:]) > 1:
            return f"parts {', '.join(dict.fromkeys(pattern.findall(text)))}"
    return None


def _segments(pattern: re.Pattern[str], text: str) -> list[str]:
    """The text before the first label, then what follows each."""
    starts = [match.start() for match in pattern.finditer(text)]
    return [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]


def _proof(text: str, answer: str) -> str | None:
    found = _PROOF.search(text)
    return found.group() if found and not _NUMERIC_TASK.search(text) else None


RULES: dict[str, Callable[[str, str], str | None]] = {
    "bad_characters": _bad_characters, "no_answer": _no_answer, "image": _image, "true_false": _true_false,
    "multiple_choice": _multiple_choice, "multi_part": _multi_part, "proof": _proof}
"""Reason -> rule of (problem text, answer): what it objects to, or None. In this order."""
