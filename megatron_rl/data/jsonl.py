"""Problems from a JSON-lines file. All bad lines are reported at once, with the config key to change."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.problems import Message, Problem, in_split

__all__ = ["JsonlProblems", "read_jsonl"]

LISTED_LINES = 20


class JsonlProblems(list[Problem]):
    """The problems of one file, in file order."""

    @property
    def domains(self) -> frozenset[str]:
        return frozenset(problem.domain for problem in self)


class BadLine(ValueError):
    """Why one line cannot be used."""


def read_jsonl(config: DataConfig) -> JsonlProblems:
    """Every problem of data.path that is in data.split; blank lines are skipped.

    A prompt is a string or a list of chat messages {role, content}. Columns that no data.*_key names go into
    the problem's metadata. Without data.id_key the id is `file:line`. Raises one ValueError that lists
    file:line and reason of every bad line (the first 20, then a count).
    """
    path = _path(config)
    problems = JsonlProblems()
    bad: list[str] = []
    line_of_id: dict[str, int] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            problem = _problem(raw, config, default_id=f"{path.name}:{number}")
            if problem.id in line_of_id:
                raise BadLine(f"id {problem.id!r} is also on line {line_of_id[problem.id]} "
                              f"(data.id_key={config.id_key})")
        except BadLine as error:
            bad.append(f"{path}:{number}: {error}")
            continue
        line_of_id[problem.id] = number
        problems.append(problem)
    if bad:
        listed = bad[:LISTED_LINES]
        if len(bad) > LISTED_LINES:
            listed.append(f"and {len(bad) - LISTED_LINES} more")
        raise ValueError(f"{len(bad)} bad line(s) in data.path={path}:\n  " + "\n  ".join(listed))
    chosen = JsonlProblems(problem for problem in problems if in_split(problem.text, config.split))
    if not chosen:
        raise ValueError(f"data.path={path} has {len(problems)} problem(s), none of them in data.split={config.split}")
    return chosen


def _path(config: DataConfig) -> Path:
    if config.path is None:
        raise ValueError("data.source=jsonl needs data.path (a JSON-lines file)")
    path = Path(config.path)
    if not path.is_file():
        raise ValueError(f"data.path={path} is not a file (looked in {Path.cwd()})")
    return path


def _problem(raw: bytes, config: DataConfig, *, default_id: str) -> Problem:
    row = _row(raw)
    prompt = _column(row, "prompt_key", config.prompt_key)
    used = {config.prompt_key, config.answer_key, config.response_key, config.domain_key, config.id_key}
    return Problem(
        id=default_id if config.id_key is None else _identifier(row, config.id_key),
        text=_messages(prompt, config) if isinstance(prompt, list) else _string(row, "prompt_key", config.prompt_key),
        answer=_string(row, "answer_key", config.answer_key),
        domain=config.domain if config.domain_key is None else _string(row, "domain_key", config.domain_key),
        metadata={name: value for name, value in row.items() if name not in used},
        response=None if config.response_key is None else _string(row, "response_key", config.response_key),
    )


def _row(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise BadLine(f"a JSON {type(row).__name__}, not an object")
    return row


def _column(row: dict[str, Any], key: str, name: str) -> Any:
    if name in row:
        return row[name]
    near = difflib.get_close_matches(name, row, n=1)
    hint = f"did you mean data.{key}={near[0]}?" if near else f"set data.{key}"
    raise BadLine(f"no column {name!r} (data.{key}={name}); columns: {', '.join(row) or 'none'}; {hint}")


def _string(row: dict[str, Any], key: str, name: str) -> str:
    value = _column(row, key, name)
    where = f"column {name!r} (data.{key}={name})"
    if not isinstance(value, str):
        raise BadLine(f"{where} holds {type(value).__name__} {value!r}, not a string"[:200])
    if not value.strip():
        raise BadLine(f"{where} is empty")
    return _encodable(value, where)


def _identifier(row: dict[str, Any], name: str) -> str:
    value = _column(row, "id_key", name)
    return str(value) if type(value) is int else _string(row, "id_key", name)


def _messages(value: list[Any], config: DataConfig) -> tuple[Message, ...]:
    where = f"column {config.prompt_key!r} (data.prompt_key={config.prompt_key})"
    if config.template == "plain":
        raise BadLine(f"{where} is a list of chat messages, which data.template=plain cannot send; "
                      "set data.template=chat")
    if not value:
        raise BadLine(f"{where} is an empty list of messages")
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) and fields[name].strip() for name in ("role", "content")):
            raise BadLine(f"{where} has a message without text in role and content: {message!r}"[:200])
    return tuple({"role": m["role"], "content": _encodable(m["content"], where)} for m in value)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(f"{where} has half of a surrogate pair at character {error.start}") from error
    return text
