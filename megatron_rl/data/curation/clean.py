"""Rule-based cleansing (Sec. 2.3): problems that a rule-based verifier cannot judge, or that are not whole."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from megatron_rl.data.curation.items import Item, Removal, Split, problem_text

__all__ = ["RULES", "clean", "objection"]

_IMAGE = re.compile(
    r"!\[[^\]]*\]\(|<img\b|\\includegraphics|\[asy\]|\[img\]|https?://\S+\.(?:png|jpe?g|gif|svg)"
    r"|\b(?:figure|diagram|picture|image|graph|chart|drawing|illustration)s?\s+(?:is\s+|are\s+)?"
    r"(?:below|above|shown|at\s+(?:the\s+)?(?:right|left))"
    r"|\b(?:in|from|see|of|on|to)\s+(?:the|this|adjacent)\s+(?:(?:adjacent|following|accompanying|attached)\s+)?"
    r"(?:figure|diagram|picture|illustration)\b|\bas\s+(?:is\s+)?(?:shown|pictured|illustrated)\b|\bpictured\b",
    re.IGNORECASE)
_OPTIONS = re.compile(r"(?:^|[\s$~])(?:\\(?:text|textbf|mathrm|mathbf)\s?\{)?\(?([A-E])(?:\)\s?\}|[).:])", re.MULTILINE)
_SMALL_OPTIONS = re.compile(r"(?:^|\s)\(([a-e])\)\s", re.MULTILINE)
_ASKS_TO_CHOOSE = re.compile(r"\bwhich (?:one )?of (?:the following|these)\b|\b(?:choose|select) the (?:correct|best)\b"
                             r"|\b(?:multiple|single)[- ]choice\b", re.IGNORECASE)
_TRUE_FALSE = re.compile(r"\btrue or false\b|\btrue\s*/\s*false\b|\b(?:yes or no|yes/no)\b"
                         r"|\b(?:is|are) (?:this|it|the (?:following )?statements?) (?:true|false|correct)\b",
                         re.IGNORECASE)
_TRUTH_VALUES = {"true", "false", "yes", "no", "correct", "incorrect", "right", "wrong", "t", "f"}
_PARTS = (re.compile(r"(?:^|\s)\(([a-h])\)\s", re.MULTILINE),
          re.compile(r"(?:^|\s)\((i{1,3}|iv|v)\)\s", re.MULTILINE),
          re.compile(r"^\s*(\d)[.)]\s", re.MULTILINE), re.compile(r"\bpart\s+\(?([A-D1-4])\)?", re.IGNORECASE))
_TASK = re.compile(r"\b(?:find|prove|show|determine|compute|calculate|evaluate|solve|what|how|sketch|express|write|"
                   r"explain|deduce|estimate|verify|hence)\b|\?", re.IGNORECASE)
_NO_ANSWER = re.compile(r"^(?:n/?a|none|null|nan|unknown|no answer|see (?:the )?(?:solution|above|below)|"
                        r"answers? (?:may )?var(?:y|ies)|proof|omitted|-+|\?+|\.+)\.?$", re.IGNORECASE)
_PROOF = re.compile(r"\b(?:prove|show) that\b|\bgive a proof\b|\bprove\b[^.?]*[.]?\s*$", re.IGNORECASE)
_NUMERIC_TASK = re.compile(r"\b(?:find|determine|compute|calculate|evaluate|what|how (?:many|much|long|far))\b",
                           re.IGNORECASE)


def clean(items: Sequence[Item]) -> Split:
    """Removes what a rule of RULES objects to; a problem is removed for the first one."""
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
    return found and found.group().strip()


def _no_answer(text: str, answer: str) -> str | None:
    return f"answer {answer!r}" if _NO_ANSWER.match(answer) or not answer else None


def _true_false(text: str, answer: str) -> str | None:
    if answer.casefold().strip(".$ ") in _TRUTH_VALUES - {"t", "f"}:
        return f"answer {answer!r}"
    found = _TRUE_FALSE.search(text)
    return found and found.group()


def _multiple_choice(text: str, answer: str) -> str | None:
    if found := _ASKS_TO_CHOOSE.search(text):
        return found.group()
    if "ABC" in (labels := "".join(_OPTIONS.findall(text))):
        return f"options {', '.join(labels)}"
    labels = "".join(_SMALL_OPTIONS.findall(text))  # which also label parts; those have tasks of their own
    tasks = any(_TASK.search(segment) for segment in _segments(_SMALL_OPTIONS, text)[1:])
    return f"options {', '.join(labels)}" if "abc" in labels and not tasks else None


def _multi_part(text: str, answer: str) -> str | None:
    for pattern in _PARTS:
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
