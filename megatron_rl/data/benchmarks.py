"""Benchmark files as their authors publish them: GSM8K, AIME, GPQA and LiveCodeBench; docs/data.md has the columns.

Each row becomes a Problem of the kind that the rewards judge. Files: JSON lines, a JSON list, CSV or Parquet.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import random
import re
import zlib
from collections.abc import Callable
from typing import Any

from megatron_rl.config.data import DataConfig
from megatron_rl.data.files import FileProblems, report_bad
from megatron_rl.data.problems import Problem
from megatron_rl.data.rows import BadRow, Row, read_file

__all__ = ["BENCHMARKS", "read_benchmark"]

LETTERS = "ABCD"
# what the benchmark's own starter code takes for granted, such as List
PYTHON_IMPORTS = ("from typing import *\nfrom collections import *\nfrom functools import *\nfrom itertools import *\n"
                  "from math import ceil, floor, gcd, inf, sqrt\nfrom heapq import *\nfrom bisect import *\n"
                  "import bisect, collections, functools, heapq, itertools, math, random, re, string, sys\n")
QUESTION = ("problem", "Problem", "question", "Question", "prompt")
ANSWER = ("answer", "Answer")
IDENTIFIER = ("id", "ID", "Record ID", "question_id", "unique_id")


def read_benchmark(config: DataConfig) -> FileProblems:
    """The problems of data.path, a file of data.source, in all splits. Bad rows are handled as data.on_error says."""
    make, problems, bad = BENCHMARKS[config.source], FileProblems(), []
    for row in read_file(config):
        try:
            if isinstance(row.fields, BadRow):
                raise row.fields
            problem = make(row, row.fields, config.domain)
        except BadRow as error:
            bad.append(f"{row.where}: {error}")
            continue
        problems.places[problem.id] = row.where
        problems.append(problem)
    if bad:
        report_bad(bad, config)
    if not problems:
        raise ValueError(f"data.path={config.path} has no problem of data.source={config.source}")
    problems.skipped = len(bad)
    return problems


def _aime(row: Row, fields: dict[str, Any], domain: str) -> Problem:
    answer = str(_first(fields, ANSWER)).strip()
    if not answer.isdecimal() or int(answer) > 999:
        raise BadRow(f"answer {answer!r} is not a whole number from 0 to 999")
    return Problem(_identifier(row, fields), _text(fields, QUESTION), str(int(answer)), domain)


def _gsm8k(row: Row, fields: dict[str, Any], domain: str) -> Problem:
    """The answer stands after the solution's last `####`."""
    _, mark, answer = _text(fields, ("answer",)).rpartition("####")
    number = answer.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", number):
        raise BadRow(f"the answer does not end with #### and a number: {answer.strip()!r}"[:200])
    return Problem(_identifier(row, fields), _text(fields, ("question",)), number, domain)


def _gpqa(row: Row, fields: dict[str, Any], domain: str) -> Problem:
    """The question fixes the order of the options, so it is the same in every run. The answer is the letter."""
    question = _text(fields, ("Question",))
    options = [_text(fields, (name,)).strip() for name in
               ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")]
    order = list(range(len(options)))
    random.Random(hashlib.blake2b(question.encode()).digest()).shuffle(order)
    listed = "\n".join(f"{letter}) {options[place]}" for letter, place in zip(LETTERS, order, strict=True))
    return Problem(_identifier(row, fields), f"{question.strip()}\n\n{listed}\n\nAnswer with the letter of one option.",
                   LETTERS[order.index(0)], domain)


def _livecodebench(row: Row, fields: dict[str, Any], domain: str) -> Problem:
    """Public and private tests together, as the columns of domain `code` (reward/code.py): stdin or function."""
    starter = fields.get("starter_code") or ""
    if not isinstance(starter, str):
        raise BadRow(f"column starter_code holds {type(starter).__name__} {starter!r}, not a string"[:200])
    cases = [*_cases(fields, "public_test_cases"), *_cases(fields, "private_test_cases")]
    if not cases:
        raise BadRow("no test case")
    metadata = {"language": "python", "context": PYTHON_IMPORTS,
                **{name: fields.get(name) for name in ("difficulty", "contest_date")}}
    try:
        if starter.strip():
            metadata |= {"mode": "function", "entry_point": json.loads(fields.get("metadata") or "{}")["func_name"],
                         "tests": [{"args": [json.loads(line) for line in case["input"].split("\n")],
                                    "expected": json.loads(case["output"])} for case in cases]}
        else:
            metadata |= {"mode": "stdin", "tests": [{"input": case["input"], "output": case["output"]}
                                                    for case in cases]}
    except (KeyError, TypeError, ValueError) as error:
        raise BadRow(f"a test case does not fit: {type(error).__name__}: {error}"[:200]) from error
    how = (f"Complete this, keeping its names:\n```python\n{starter}\n```" if starter.strip() else
           "Read from standard input and write to standard output.")
    text = f"{_text(fields, ('question_content',)).strip()}\n\n{how}\nAnswer with one ```python code block."
    return Problem(_identifier(row, fields), text, "", "code" if domain == "math" else domain, metadata)


class _TextOnly(pickle.Unpickler):
    """LiveCodeBench pickles a string; anything that would have to be imported is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a list of tests does not need")


def _cases(fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A list of {input, output}: JSON, or JSON that is pickled, compressed and in base 64."""
    value = fields.get(name) or []
    try:
        if isinstance(value, str):
            value = json.loads(value if value.lstrip()[:1] in "[{" else _unpacked(value))
        if not isinstance(value, list):
            raise TypeError(f"{type(value).__name__}, not a list")
        return value
    except (ValueError, TypeError, EOFError, OverflowError, RecursionError, zlib.error,
            pickle.UnpicklingError) as error:
        raise BadRow(f"{name} can be read neither as JSON nor as packed JSON: {error}"[:200]) from error


def _unpacked(value: str) -> Any:
    return _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if fields.get(name) not in (None, ""):
            return fields[name]
    raise BadRow(f"no column {' or '.join(names)}; columns: {', '.join(fields) or 'none'}")


def _text(fields: dict[str, Any], names: tuple[str, ...]) -> str:
    value = _first(fields, names)
    if not isinstance(value, str):
        raise BadRow(f"column {' or '.join(names)} holds {type(value).__name__} {value!r}, not a string"[:200])
    return value


def _identifier(row: Row, fields: dict[str, Any]) -> str:
    return next((str(fields[name]) for name in IDENTIFIER if fields.get(name) is not None), row.name)


BENCHMARKS: dict[str, Callable[[Row, dict[str, Any], str], Problem]] = {
    "gsm8k": _gsm8k, "aime": _aime, "gpqa": _gpqa, "livecodebench": _livecodebench}
