"""Problems from a user's file. One error reports all bad rows, with the config key to change."""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.problems import Message, Problem
from megatron_rl.data.rows import BadRow, Row, read_rows

__all__ = ["FileProblems", "is_absent", "missing", "problem_of", "read_problems", "report_bad", "value_of"]

LISTED_ROWS = 20
OPTIONAL_KEYS = ("response_key", "domain_key", "id_key")
_LOG = logging.getLogger(__name__)


class FileProblems(list[Problem]):
    """The problems of one file, in file order. skipped: how many bad rows data.on_error=skip left out.

    places: id -> file and row, for messages.
    """

    skipped: int = 0

    def __init__(self, problems: Iterable[Problem] = (), places: Mapping[str, str] | None = None):
        super().__init__(problems)
        self.places = dict(places or {})

    @property
    def domains(self) -> frozenset[str]:
        return frozenset(problem.domain for problem in self)


def read_problems(config: DataConfig) -> FileProblems:
    """Every problem of data.path, in all splits.

    A prompt is a string or a list of chat messages {role, content}. Columns that no data.*_key names go into
    the problem's metadata. Without data.id_key the id is `file:row`. One ValueError lists place and reason of every
    bad row (the first 20, then a count); with data.on_error=skip they are left out and the list is a warning.
    """
    problems, bad = FileProblems(), []
    unseen = {key: getattr(config, key) for key in OPTIONAL_KEYS if getattr(config, key) is not None}
    columns: dict[str, None] = {}
    for row in read_rows(config):
        try:
            problem = problem_of(row, config)
            if problem.id in problems.places:
                raise BadRow(f"id {problem.id!r} is also on {_line(problems.places[problem.id])} "
                             f"(data.id_key={config.id_key})")
        except BadRow as error:
            bad.append(f"{row.where}: {error}")
            continue
        problems.places[problem.id] = row.where
        problems.append(problem)
        columns |= dict.fromkeys(row.fields)
        unseen = {key: name for key, name in unseen.items() if value_of(row.fields, name) is None}
    if bad:
        report_bad(bad, config)
    problems.skipped = len(bad)
    if not problems:
        raise ValueError(f"data.path={config.path} holds no problem")
    for key, name in unseen.items():
        raise ValueError(f"data.path={config.path}: {missing(columns, key, name)}")
    return problems


def problem_of(row: Row, config: DataConfig) -> Problem:
    """The problem of one row. BadRow says what is wrong with the row. A column without a value counts as absent."""
    if isinstance(row.fields, BadRow):
        raise row.fields
    fields = row.fields
    prompt = value_of(fields, config.prompt_key)
    response = None if config.response_key is None else _optional(fields, "response_key", config.response_key)
    if isinstance(prompt, list):
        text, answered = _messages(prompt, config)
        response = answered if config.response_key is None else response
    else:
        text = _string(fields, "prompt_key", config.prompt_key)
    used = {config.prompt_key, config.answer_key, config.response_key, config.domain_key, config.id_key}
    metadata = {name: value for name, value in fields.items() if name not in used and not is_absent(value)}
    if metadata.get("mode") in ("stdin", "function") and isinstance(metadata.get("tests"), str):
        metadata["tests"] = _json(metadata["tests"], "tests")
    return Problem(
        id=row.name if config.id_key is None else _identifier(fields, config.id_key) or row.name,
        text=text,
        answer=_answer(fields, config.answer_key),
        domain=config.domain if config.domain_key is None
        else _optional(fields, "domain_key", config.domain_key) or config.domain,
        metadata=metadata,
        response=response,
    )


def report_bad(bad: list[str], config: DataConfig) -> None:
    """Reports `bad`, a line for each bad row, as data.on_error says: ValueError, or a warning."""
    listed = bad[:LISTED_ROWS]
    if len(bad) > LISTED_ROWS:
        listed.append(f"and {len(bad) - LISTED_ROWS} more")
    lines = "\n  ".join(listed)
    if config.on_error == "stop":
        raise ValueError(f"{len(bad)} bad line(s) in data.path={config.path} (data.on_error=skip leaves them out):"
                         f"\n  {lines}")
    _LOG.warning("%d bad line(s) of data.path=%s left out:\n  %s", len(bad), config.path, lines)


def _line(where: str) -> str:
    """`line 3` of path:3, `row 3` of `path row 3`."""
    return f"row {where.rpartition(' row ')[2]}" if " row " in where else f"line {where.rpartition(':')[2]}"


def missing(columns: Iterable[str], key: str, name: str) -> str:
    """Says that there is no such column, which columns there are, and which was probably meant."""
    near = difflib.get_close_matches(name, columns := list(columns), n=1)
    hint = f"did you mean data.{key}={near[0]}?" if near else f"set data.{key}"
    return f"no column {name!r} (data.{key}={name}); columns: {', '.join(columns) or 'none'}; {hint}"


def is_absent(value: Any) -> bool:
    """Whether it is null, or the NaN that stands for null in tables."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """The column's value, None if it is absent. A name with dots goes into nested columns, unless a column has it."""
    if name in row:
        return None if is_absent(row[name]) else row[name]
    outer, dot, inner = name.partition(".")
    return value_of(row[outer], inner) if dot and isinstance(row.get(outer), dict) else None


def _string(row: dict[str, Any], key: str, name: str) -> str:
    value = value_of(row, name)
    if value is None and name not in row:
        raise BadRow(missing(row, key, name))
    where = f"column {name!r} (data.{key}={name})"
    if not isinstance(value, str):
        raise BadRow(f"{where} holds {type(value).__name__} {value!r}, not a string"[:200])
    if not value.strip():
        raise BadRow(f"{where} is empty")
    return value


def _optional(row: dict[str, Any], key: str, name: str) -> str | None:
    return None if value_of(row, name) is None else _string(row, key, name)


def _identifier(row: dict[str, Any], name: str) -> str | None:
    value = value_of(row, name)
    return str(value) if type(value) is int else _optional(row, "id_key", name)


def _answer(row: dict[str, Any], name: str) -> str:
    """The reference as text: a number as it is written, a list with commas; "" without one (the scorer minds)."""
    value = value_of(row, name)
    where = f"column {name!r} (data.answer_key={name})"
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, (list, dict, bytes)) or item is None for item in items) and value is not None:
        raise BadRow(f"{where} holds {value!r}: neither text, a number, nor a list of them"[:200])
    return "" if value is None else ", ".join(_written(item, where) for item in items)


def _written(value: Any, where: str) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow(f"{where} holds {value!r}, which is no number")
        if value.is_integer() and abs(value) < 2 ** 53:
            return str(int(value))  # tables turn whole numbers into such when a row has none
    if isinstance(value, int) and abs(value) >= 10 ** 4000:
        raise BadRow(f"{where} is a number of more than 4,000 digits: write it as text")
    return str(value).strip() if isinstance(value, str) else str(value)


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"column {name!r} is text, but no JSON: {error}"[:200]) from error


def _messages(value: list[Any], config: DataConfig) -> tuple[tuple[Message, ...], str | None]:
    """(the messages of the prompt, what the assistant answered). An answer at the end is not part of a prompt."""
    where = f"column {config.prompt_key!r} (data.prompt_key={config.prompt_key})"
    if config.template == "plain":
        raise BadRow(f"{where} is a list of chat messages, which data.template=plain cannot send; "
                     "set data.template=chat")
    if not value:
        raise BadRow(f"{where} is an empty list of messages")
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")) or not (
                fields["role"].strip() and (fields["content"].strip() or fields["role"] == "system")):
            raise BadRow(f"{where} has a message without text in role and content: {message!r}"[:200])
    messages, answers = [{"role": m["role"], "content": m["content"]} for m in value], []
    while messages and messages[-1]["role"] == "assistant":
        answers.insert(0, messages.pop()["content"])
    if not any(message["role"] != "system" for message in messages):
        raise BadRow(f"{where} has no message before the assistant's answer")
    return tuple(messages), "\n".join(answers) or None
