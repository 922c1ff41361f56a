"""Programs: the last code block of a response, judged by the tests of its problem, in the sandbox.

A problem's metadata says how (columns of a JSON-lines file, or data.source=human_eval):
  language     python | cpp | java
  mode         stdin: tests = [{"input": text, "output": text}, ...]
               function: tests = [{"args": [...], "expected": value}, ...] and entry_point
               unit: tests = source text; for Python with entry_point, plain asserts or a function check(candidate)
  context      source text that the solution continues or may use (imports, helpers); optional
  time_s, memory_mb, tolerance   instead of reward.code's; optional
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_rl.config.reward import RewardConfig
from megatron_rl.reward.base import Job, run
from megatron_rl.reward.judges import judge_code
from megatron_rl.reward.languages import ALIASES, LANGUAGES
from megatron_rl.reward.remote import Remote
from megatron_rl.reward.sandbox import Bubblewrap, Unsafe
from megatron_rl.types import Prompt, Score

__all__ = ["CodeScorer", "CodeTask", "last_code_block"]

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#-]*)[^\n`]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
JOB_SLACK_S = 30.0


@dataclass(frozen=True)
class CodeTask:
    """What metadata says about one problem, checked. tests: as the module's docstring has it."""

    language: Literal["python", "cpp", "java"]
    mode: Literal["stdin", "function", "unit"]
    tests: Any
    entry_point: str
    context: str
    time_s: int
    memory_mb: int
    compile_s: int
    tolerance: float

    @property
    def longest_s(self) -> float:
        """Seconds after which judging it has certainly gone wrong: every test just within its limits."""
        runs = len(self.tests) if self.mode == "stdin" else 1
        return JOB_SLACK_S + 3 * self.compile_s + runs * (3 * self.time_s + 3)


class CodeScorer:
    """1 only if every test passes. Otherwise 0, and the status of the first test that does not: wrong, timeout,
    runtime_error, memory_limit, output_limit; compile_error for what is no program; no_answer without a code block.

    Raises RuntimeError that says what to do where reward.sandbox cannot run.
    """

    preload = ("megatron_rl.reward.judges",)

    def __init__(self, config: RewardConfig):
        self._limits, self._remote = config.code, config.sandbox == "remote"
        self._box = (Remote(config.remote) if config.sandbox == "remote" else
                     Unsafe() if config.sandbox == "unsafe" else Bubblewrap())
        self._box.check()

    @staticmethod
    def warm_up() -> None:
        """Imports are preloaded; there is nothing else to warm."""

    def prepare(self, prompt: Prompt, response_text: str) -> Score | Job:
        task = self._task(prompt)
        code = last_code_block(response_text, task.language)
        if code is None or not code.strip():
            return Score(0.0, "no_answer", f"no closed ``` block of {task.language}")
        key = json.dumps([asdict(task), code], sort_keys=True, default=repr)
        return Job(judge_code, (self._box, task, code), ("code", hashlib.blake2b(key.encode()).digest()),
                   timeout_s=task.longest_s)

    def score(self, prompt: Prompt, response_text: str) -> Score:
        return run(self.prepare(prompt, response_text))

    def check(self, prompt: Prompt) -> None:
        """ValueError that names the prompt and the column at fault if its programs cannot be judged."""
        self._task(prompt)

    def _task(self, prompt: Prompt) -> CodeTask:
        """ValueError that names the prompt and the column at fault."""
        columns, limits = prompt.metadata, self._limits
        language = _one_of(prompt, columns, "language", LANGUAGES)
        mode = _one_of(prompt, columns, "mode", ("stdin", "function", "unit"))
        entry_point = columns.get("entry_point", "")
        if not entry_point and (mode == "function" or (mode == "unit" and language == "python")):
            raise ValueError(f"prompt {prompt.id}: mode={mode} needs entry_point, the name of the function")
        if self._remote and language == "java" and mode != "stdin":
            raise ValueError(f"prompt {prompt.id}: reward.sandbox=remote judges Java in mode=stdin only, not {mode}")
        return CodeTask(language, mode, _tests(prompt, columns.get("tests"), mode), entry_point,
                        columns.get("context", ""), int(columns.get("time_s", limits.time_s)),
                        int(columns.get("memory_mb", limits.memory_mb)), limits.compile_s,
                        float(columns.get("tolerance", limits.tolerance)))


def last_code_block(text: str, language: str) -> str | None:
    """The content of the last closed ``` block that is marked with the language or with none; None without one."""
    blocks = [code for tag, code in _FENCE.findall(text) if not tag or tag.lower() in ALIASES[language]]
    return blocks[-1] if blocks else None


def _one_of(prompt: Prompt, columns: Mapping[str, Any], name: str, known: Any) -> Any:
    if columns.get(name) not in known:
        raise ValueError(f"prompt {prompt.id}: {name}={columns.get(name)!r}; reward.routes.{prompt.domain}=code needs "
                         f"metadata {name}, one of {' | '.join(known)}")
    return columns[name]


def _tests(prompt: Prompt, tests: Any, mode: str) -> Any:
    fields = {"stdin": ("input", "output"), "function": ("args", "expected")}.get(mode)
    if fields is None:
        fits = isinstance(tests, str) and bool(tests.strip())
    else:
        fits = isinstance(tests, (list, tuple)) and len(tests) > 0 and all(
            isinstance(test, dict) and all(name in test for name in fields) for test in tests)
    if not fits:
        shape = "source text" if fields is None else f"a list of objects with {' and '.join(fields)}"
        raise ValueError(f"prompt {prompt.id}: tests of mode={mode} must be {shape}, not {tests!r}"[:300])
    return tests
