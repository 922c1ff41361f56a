"""Problems from a file of the user's. All bad rows are reported at once, with the config key to change."""

from __future__ import annotations

import difflib
import logging
from typing import Any

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.problems import Message, Problem, in_split
from megatron_rl.data.rows import BadRow, Row, read_rows

__all__ = ["FileProblems", "problem_of", "read_problems", "report_bad"]

LISTED_ROWS = 20
_LOG = logging.getLogger(__name__)


class FileProblems(list[Problem]):
    """The problems of one file, in file order. skipped: bad rows left out under data.on_error=skip."""

    skipped: int = 0

    @property
    def domains(self) -> frozenset[str]:
        return frozenset(problem.domain for problem in self)


def read_problems(config: DataConfig) -> FileProblems:
    """Every problem of data.path that is in data.split.

    A prompt is a string or a list of chat messages {role, content}. Columns that no data.*_key names go into
    the problem's metadata. Without data.id_key the id is `file:row`. One ValueError lists place and reason of every
    bad row (the first 20, then a count); with data.on_error=skip they are left out and the list is a warning.
    """
    problems = FileProblems()
    bad: list[str] = []
    place_of_id: dict[str, str] = {}
    for row in read_rows(config):
        try:
            problem = problem_of(row, config)
            if problem.id in place_of_id:
                raise BadRow(f"id {problem.id!r} is also on {_line(place_of_id[problem.id])} "
                             f"(data.id_key={config.id_key})")
        except BadRow as error:
            bad.append(f"{row.where}: {error}")
            continue
        place_of_id[problem.id] = row.where
        problems.append(problem)
    if bad:
        report_bad(bad, config)
    chosen = FileProblems(problem for problem in problems if in_split(problem.text, config.split))
    chosen.skipped = len(bad)
    if not problems:
        raise ValueError(f"data.path={config.path} holds no problem")
    if not chosen:
        raise ValueError(f"data.path={config.path} has {len(problems)} problem(s), none of them in "
                         f"data.split={config.split}, which parts them by a hash of the text: give more, or train on "
                         "all (data.split=all) and evaluate on others (eval.data)")
    return chosen


def problem_of(row: Row, config: DataConfig) -> Problem:
    """The problem of one row. BadRow says what is wrong with it."""
    if isinstance(row.fields, BadRow):
        raise row.fields
    fields = row.fields
    prompt = _column(fields, "prompt_key", config.prompt_key)
    used = {config.prompt_key, config.answer_key, config.response_key, config.domain_key, config.id_key}
    return Problem(
        id=row.name if config.id_key is None else _identifier(fields, config.id_key),
        text=_messages(prompt, config) if isinstance(prompt, list)
        else _string(fields, "prompt_key", config.prompt_key),
        answer=_string(fields, "answer_key", config.answer_key),
        domain=config.domain if config.domain_key is None else _string(fields, "domain_key", config.domain_key),
        metadata={name: value for name, value in fields.items() if name not in used},
        response=None if config.response_key is None else _string(fields, "response_key", config.response_key),
    )


def report_bad(bad: list[str], config: DataConfig) -> None:
    """`bad`, a line for each bad row, as data.on_error says: ValueError, or a warning."""
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


def _column(row: dict[str, Any], key: str, name: str) -> Any:
    if name in row:
        return row[name]
    near = difflib.get_close_matches(name, row, n=1)
    hint = f"did you mean data.{key}={near[0]}?" if near else f"set data.{key}"
    raise BadRow(f"no column {name!r} (data.{key}={name}); columns: {', '.join(row) or 'none'}; {hint}")


def _string(row: dict[str, Any], key: str, name: str) -> str:
    value = _column(row, key, name)
    where = f"column {name!r} (data.{key}={name})"
    if not isinstance(value, str):
        raise BadRow(f"{where} holds {type(value).__name__} {value!r}, not a string"[:200])
    if not value.strip():
        raise BadRow(f"{where} is empty")
    return _encodable(value, where)


def _identifier(row: dict[str, Any], name: str) -> str:
    value = _column(row, "id_key", name)
    return str(value) if type(value) is int else _string(row, "id_key", name)


def _messages(value: list[Any], config: DataConfig) -> tuple[Message, ...]:
    where = f"column {config.prompt_key!r} (data.prompt_key={config.prompt_key})"
    if config.template == "plain":
        raise BadRow(f"{where} is a list of chat messages, which data.template=plain cannot send; "
                     "set data.template=chat")
    if not value:
        raise BadRow(f"{where} is an empty list of messages")
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) and fields[name].strip() for name in ("role", "content")):
            raise BadRow(f"{where} has a message without text in role and content: {message!r}"[:200])
    return tuple({"role": m["role"], "content": _encodable(m["content"], where)} for m in value)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} has half of a surrogate pair at character {error.start}") from error
    return text
