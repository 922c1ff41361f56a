"""What every step of curation reads and writes: rows with their problems, and the reason for each removed row."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_rl.config.data import DataConfig
from megatron_rl.data.files import is_absent, problem_of, report_bad
from megatron_rl.data.problems import Problem, asked
from megatron_rl.data.rows import FILE_SOURCES, BadRow, Row, read_rows
from megatron_rl.observe.files import write_together

__all__ = ["Item", "Removal", "Split", "problem_text", "read_items", "words", "write_split"]

KEPT, REMOVED, REPORT = "kept.jsonl", "removed.jsonl", "report.json"
_CJK = "\\u3040-\\u30ff\\u3400-\\u9fff\\uac00-\\ud7af"  # written without spaces: each character is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[-+*/=<>^]")


@dataclass(frozen=True)
class Item:
    """One row as it was read, and the problem it holds."""

    row: Row
    problem: Problem


@dataclass(frozen=True)
class Removal:
    """why: one of a few words, for counting; detail: what was found."""

    why: str
    detail: str = ""


@dataclass
class Split:
    """The outcome of one step. notes: place in `items` -> columns to add to that row, kept or removed."""

    items: Sequence[Item]
    removed: dict[int, Removal]
    notes: Mapping[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How many were read, how many stay, how many went for each reason."""
        reasons = Counter(removal.why for removal in self.removed.values())
        return {"read": len(self.items), "kept": len(self.items) - len(self.removed), **dict(reasons.most_common())}


def read_items(config: DataConfig) -> tuple[list[Item], list[tuple[Row, Removal]]]:
    """(the rows of data.path that hold a problem, the others). All splits, because curation comes before the split.

    Rows without a problem stop the load, or are logged and returned, as data.on_error says. ValueError for a source
    that is not a file.
    """
    if config.source not in FILE_SOURCES:
        raise ValueError(f"data.source={config.source} is not a file: curation reads {', '.join(FILE_SOURCES)}")
    items, bad = [], []
    for row in read_rows(config):
        try:
            problem = problem_of(row, config)
        except BadRow as error:
            bad.append((row, Removal("bad_row", str(error))))
            continue
        try:
            _line(row.fields)  # what cannot be written again must not end a step half-way
        except BadRow as error:
            bad.append((replace(row, fields=error), Removal("bad_row", str(error))))
            continue
        items.append(Item(row, problem))
    if bad:
        report_bad([f"{row.where}: {removal.detail}" for row, removal in bad], config)
    return items, bad


def write_split(folder: Path, split: Split, bad: Sequence[tuple[Row, Removal]] = ()) -> dict[str, int]:
    """Writes kept.jsonl and removed.jsonl with the rows as they were read, and report.json with the counts, which it
    returns.

    All three files appear once all are whole; after an earlier error nothing has changed. A removed row has one more
    column, removed: {"why", "detail", "from"}.
    """
    kept, removed = [], [_removed(row, removal, {}) for row, removal in bad]
    for place, item in enumerate(split.items):
        extra = split.notes.get(place, {})
        if place in split.removed:
            removed.append(_removed(item.row, split.removed[place], extra))
        else:
            kept.append({**item.row.fields, **extra})
    counts = split.counts
    if bad:
        counts |= {"read": counts["read"] + len(bad), "bad_row": len(bad)}
    texts = {KEPT: "".join(map(_line, kept)), REMOVED: "".join(map(_line, removed)),
             REPORT: json.dumps(counts, indent=2) + "\n"}
    folder.mkdir(parents=True, exist_ok=True)
    write_together({folder / name: [text.encode("utf-8")] for name, text in texts.items()})
    return counts


def _removed(row: Row, removal: Removal, extra: Mapping[str, Any]) -> dict[str, Any]:
    fields = {} if isinstance(row.fields, BadRow) else row.fields
    return {**fields, **extra, "removed": {"why": removal.why, "detail": removal.detail, "from": row.where}}


def _line(row: Mapping[str, Any]) -> str:
    """The row as a line of JSON; NaN, as tables have it for null, becomes null. BadRow names what cannot be written."""
    try:
        return json.dumps(row, ensure_ascii=False, default=_plain, allow_nan=False) + "\n"
    except BadRow:
        raise
    except ValueError:
        pass
    try:
        return json.dumps(_without_nan(row), ensure_ascii=False, default=_plain, allow_nan=False) + "\n"
    except ValueError as error:
        raise BadRow("it holds an infinite number, which JSON does not know") from error


def _plain(value: Any) -> str:
    if isinstance(value, (bytes, bytearray)):
        raise BadRow(f"it holds bytes ({value[:20]!r}), which JSON lines cannot: leave the column out")
    return str(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(content) for name, content in value.items()}
    if isinstance(value, list):
        return [_without_nan(content) for content in value]
    return None if is_absent(value) else value


def problem_text(problem: Problem) -> str:
    """The text of a problem; for chat messages, what the user says."""
    return asked(problem.text)


def words(text: str) -> list[str]:
    """Words, numbers and arithmetic signs, without case, accents' encoding, punctuation and LaTeX's layout."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = re.sub(r"\\(?:left|right|displaystyle|text|mathrm|,|;|!|quad)\b|\\[,;! ]|[${}]", " ", plain)
    return _WORD.findall(plain.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
