"""What every step of curation reads and writes: rows with their problems, and for each that goes the reason."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.config.data import DataConfig
from megatron_rl.data.files import problem_of, report_bad
from megatron_rl.data.problems import Problem, asked
from megatron_rl.data.rows import FILE_SOURCES, BadRow, Row, read_rows
from megatron_rl.observe.files import write_json

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
    """(the rows of data.path that hold a problem, the others). All splits: curation comes before the split.

    Rows that hold none stop the load, or are logged and handed back, as data.on_error says. ValueError for a source
    that is not a file.
    """
    if config.source not in FILE_SOURCES:
        raise ValueError(f"data.source={config.source} is not a file: curation reads {', '.join(FILE_SOURCES)}")
    items, bad = [], []
    for row in read_rows(config):
        try:
            items.append(Item(row, problem_of(row, config)))
        except BadRow as error:
            bad.append((row, Removal("bad_row", str(error))))
    if bad:
        report_bad([f"{row.where}: {removal.detail}" for row, removal in bad], config)
    return items, bad


def write_split(folder: Path, split: Split, bad: Sequence[tuple[Row, Removal]] = ()) -> dict[str, int]:
    """kept.jsonl and removed.jsonl with the rows as they were read, and report.json with the counts, which it returns.

    A removed row has one more column, removed: {"why", "detail", "from"}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept, removed = [], [_removed(row, removal, {}) for row, removal in bad]
    for place, item in enumerate(split.items):
        extra = split.notes.get(place, {})
        if place in split.removed:
            removed.append(_removed(item.row, split.removed[place], extra))
        else:
            kept.append({**item.row.fields, **extra})
    _write(folder / KEPT, kept)
    _write(folder / REMOVED, removed)
    counts = split.counts
    if bad:
        counts |= {"read": counts["read"] + len(bad), "bad_row": len(bad)}
    write_json(folder / REPORT, counts)
    return counts


def _removed(row: Row, removal: Removal, extra: Mapping[str, Any]) -> dict[str, Any]:
    fields = {} if isinstance(row.fields, BadRow) else row.fields
    return {**fields, **extra, "removed": {"why": removal.why, "detail": removal.detail, "from": row.where}}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def problem_text(problem: Problem) -> str:
    """The text of a problem; of chat messages, what the user says."""
    return asked(problem.text)


def words(text: str) -> list[str]:
    """Words, numbers and arithmetic signs, without case, accents' encoding, punctuation and LaTeX's layout."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = re.sub(r"\\(?:left|right|displaystyle|text|mathrm|,|;|!|quad)\b|\\[,;! ]|[${}]", " ", plain)
    return _WORD.findall(plain.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
