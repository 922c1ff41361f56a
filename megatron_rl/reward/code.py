"""Programs: a code block of a response, judged by the tests of its problem, in the sandbox.

A problem's metadata says how (columns of a JSON-lines file, or data.source=human_eval):
  language     python | cpp | java
  mode         stdin: tests = [{"input": text, "output": text}, ...]
               function: tests = [{"args": [...], "expected": value}, ...] and entry_point
               unit, Python only: tests = source text and entry_point; plain asserts, a function check(candidate),
               functions test_*, or unittest
  entry_point  f, Class.f or Class().f
  context      source text that the solution continues or may use (imports, helpers); optional
  time_s, memory_mb, tolerance   instead of reward.code's; optional
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_rl.config.reward import RewardConfig
from megatron_rl.reward.base import Job, run
from megatron_rl.reward.boxed import with_thinking
from megatron_rl.reward.calls import literal, split_entry_point
from megatron_rl.reward.harness import wire
from megatron_rl.reward.judges import judge_response
from megatron_rl.reward.languages import ALIASES, LANGUAGES
from megatron_rl.reward.remote import Remote
from megatron_rl.reward.sandbox import Bubblewrap, Limits, Unsafe
from megatron_rl.types import Prompt, Score

__all__ = ["CodeScorer", "CodeTask"]

JOB_SLACK_S = 30.0
KNOWN_PROMPTS = 4096
MOST = 1e6  # seconds, MB
MODES = ("stdin", "function", "unit")
FIELDS = {"stdin": ("input", "output"), "function": ("args", "expected")}


@dataclass(frozen=True)
class CodeTask:
    """One problem's metadata, checked. tests: in the form that the module's docstring describes."""

    language: Literal["python", "cpp", "java"]
    mode: Literal["stdin", "function", "unit"]
    tests: Any
    entry_point: str
    context: str
    time_s: float
    memory_mb: int
    compile_s: int
    tolerance: float
    judge_thinking: bool

    @property
    def longest_s(self) -> float:
        """Seconds that judging can take at most: every test just within its limits."""
        runs = len(self.tests) if self.mode == "stdin" else 1
        return JOB_SLACK_S + Limits(cpu_s=self.compile_s).end_s + runs * Limits(cpu_s=self.time_s).end_s


class CodeScorer:
    """1 only if every test passes.

    Otherwise 0, with the status of the first test that fails: wrong, timeout, runtime_error,
    memory_limit, output_limit; compile_error if the text is not a program; no_answer without a code block.

    RuntimeError that says what to do if reward.sandbox cannot run.
    """

    preload = ("megatron_rl.reward.judges",)

    def __init__(self, config: RewardConfig):
        self._limits, self._remote = config.code, config.sandbox == "remote"
        self._box = (Remote(config.remote) if config.sandbox == "remote" else
                     Unsafe() if config.sandbox == "unsafe" else Bubblewrap())
        self._box.check()
        self._known: dict[str, tuple[Prompt, CodeTask, bytes]] = {}

    @staticmethod
    def warm_up() -> None:
        """Imports are preloaded; there is nothing else to warm."""

    def prepare(self, prompt: Prompt, response_text: str) -> Job:
        """Leaves even the search for the code block to the worker, so that no text holds up the caller."""
        task, digest = self._task_and_digest(prompt)
        response_text = with_thinking(response_text, prompt.text)
        key = hashlib.blake2b(response_text.encode(errors="surrogatepass"), key=digest).digest()
        return Job(judge_response, (self._box, task, response_text), ("code", key), timeout_s=task.longest_s)

    def score(self, prompt: Prompt, response_text: str) -> Score:
        return run(self.prepare(prompt, response_text))

    def check(self, prompt: Prompt) -> None:
        """ValueError that names the prompt and the faulty column if its programs cannot be judged."""
        self._task(prompt)

    def _task_and_digest(self, prompt: Prompt) -> tuple[CodeTask, bytes]:
        """Computed once for all responses to a prompt, because tests may be megabytes."""
        known = self._known.get(prompt.id)
        if known is None or known[0] is not prompt:
            task = self._task(prompt)
            text = json.dumps(asdict(task), sort_keys=True, default=repr)
            if len(self._known) >= KNOWN_PROMPTS:
                self._known.clear()
            known = prompt, task, hashlib.blake2b(text.encode()).digest()
            self._known[prompt.id] = known
        return known[1], known[2]

    def _task(self, prompt: Prompt) -> CodeTask:
        columns = {name: value for name, value in prompt.metadata.items() if value is not None}
        said = str(columns.get("language", "")).lower()
        columns["language"] = next((name for name, others in ALIASES.items() if said in others),
                                   columns.get("language"))
        language = _one_of(prompt, columns, "language", LANGUAGES)
        mode = _one_of(prompt, columns, "mode", MODES)
        self._can_judge(prompt, language, mode)
        limits = self._limits
        return CodeTask(language, mode, _tests(prompt, columns.get("tests"), mode, language),
                        _entry_point(prompt, columns, mode), _text(prompt, columns, "context"),
                        _number(prompt, columns, "time_s", limits.time_s),
                        math.ceil(_number(prompt, columns, "memory_mb", limits.memory_mb)), limits.compile_s,
                        _number(prompt, columns, "tolerance", limits.tolerance, least=0.0), limits.judge_thinking)

    def _can_judge(self, prompt: Prompt, language: str, mode: str) -> None:
        if mode == "unit" and language != "python":
            raise ValueError(f"prompt {prompt.id}: mode=unit judges Python only: unit tests in {language} share a "
                             "process with the solution, which can forge their verdict. Give the problem "
                             "mode=function (arguments and expected values) or mode=stdin")
        if self._remote and (mode == "unit" or (language == "java" and mode != "stdin")):
            judges = "Java in mode=stdin only" if language == "java" else "mode=stdin and mode=function only"
            raise ValueError(f"prompt {prompt.id}: reward.sandbox=remote judges {judges}, not {mode}: it "
                             "runs one program at a time, so the solution could forge the verdict. "
                             "reward.sandbox=bubblewrap can")
        needs = LANGUAGES[language].needs
        if not self._remote and shutil.which(needs, path="/usr/bin:/bin:/usr/local/bin") is None:
            raise ValueError(f"prompt {prompt.id}: language={language} needs {needs} on this machine: "
                             "apt-get install python3 g++ default-jdk-headless")


def _one_of(prompt: Prompt, columns: Mapping[str, Any], name: str, known: Any) -> Any:
    if not isinstance(columns.get(name), str) or columns[name] not in known:
        raise ValueError(f"prompt {prompt.id}: {name}={columns.get(name)!r}; reward.routes.{prompt.domain}=code needs "
                         f"metadata {name}, one of {' | '.join(known)}")
    return columns[name]


def _text(prompt: Prompt, columns: Mapping[str, Any], name: str) -> str:
    value = columns.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"prompt {prompt.id}: {name} must be text, not {value!r}"[:300])
    return value


def _number(prompt: Prompt, columns: Mapping[str, Any], name: str, default: float, least: float = 0.1) -> float:
    value = columns.get(name, default)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not least <= number <= MOST:
        raise ValueError(f"prompt {prompt.id}: {name}={value!r} must be a number from {least} to {MOST:g}"[:300])
    return number


def _entry_point(prompt: Prompt, columns: Mapping[str, Any], mode: str) -> str:
    name = _text(prompt, columns, "entry_point").strip()
    if mode == "stdin":
        return ""
    if not name:
        raise ValueError(f"prompt {prompt.id}: mode={mode} needs entry_point, the name of the function")
    try:
        split_entry_point(name)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.id}: {error}") from error
    return name


def _tests(prompt: Prompt, tests: Any, mode: str, language: str) -> Any:
    fields = FIELDS.get(mode)
    if fields is None:
        fits = isinstance(tests, str) and bool(tests.strip())
    else:
        fits = isinstance(tests, (list, tuple)) and len(tests) > 0 and all(
            isinstance(test, dict) and all(name in test for name in fields) for test in tests)
    if not fits:
        shape = "source text" if fields is None else f"a list of objects with {' and '.join(fields)}"
        raise ValueError(f"prompt {prompt.id}: tests of mode={mode} must be {shape}, not {tests!r}"[:300])
    if fields is None:
        _compiles(prompt, tests)
        return tests
    if all(test[fields[1]] is None or not str(test[fields[1]]).strip() for test in tests):
        raise ValueError(f"prompt {prompt.id}: no test expects anything, so a program that does nothing would pass")
    for number, test in enumerate(tests, start=1):
        where = f"prompt {prompt.id}: test {number}"
        if mode == "stdin":
            for name in fields:
                if isinstance(test[name], bool) or not isinstance(test[name], (str, int, float)):
                    raise ValueError(f"{where}: {name} must be text, not {test[name]!r}"[:300])
        elif not isinstance(test["args"], (list, tuple)):
            raise ValueError(f"{where}: args must be a list, not {test['args']!r}"[:300])
        else:
            try:
                for value in test["args"]:
                    _ = wire.encode(value) if language == "python" else literal(language, value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}"[:300]) from error
    return tests


def _compiles(prompt: Prompt, tests: str) -> None:
    try:
        compile(tests, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"prompt {prompt.id}: its tests are no Python: {error}"[:300]) from error
