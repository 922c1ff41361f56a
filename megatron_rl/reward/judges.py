"""Judges one program by its tests. This code runs in a worker of the reward pool, the program in a sandbox.

A program shares nothing with its judge. The right answers never enter its sandbox: values and outputs leave it as data
and are compared here. Python unit tests run in a second sandbox, beside the solution's, and compare there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_rl.reward.base import verdict
from megatron_rl.reward.boxed import answer_part
from megatron_rl.reward.calls import JAVA_MAIN, call_sources, harness_source, read_values
from megatron_rl.reward.compare import same_output, same_value
from megatron_rl.reward.harness import load, tester
from megatron_rl.reward.languages import ALIASES, PYTHON, Program, build, java_classes, java_source
from megatron_rl.reward.markdown import fenced_blocks
from megatron_rl.reward.remote import Remote
from megatron_rl.reward.sandbox import Limits, Outcome
from megatron_rl.types import Score

if TYPE_CHECKING:
    from megatron_rl.reward.code import CodeTask
    from megatron_rl.reward.languages import Box

__all__ = ["judge_code", "judge_response", "solution_code"]

SLACK_BYTES = 1 << 16
SYNTAX_ERRORS = ("SyntaxError", "IndentationError", "TabError")
FAILED_STATUS = {tester.FAILED: "wrong", tester.RAISED: "runtime_error"}


def judge_response(box: Box | Remote, task: CodeTask, response_text: str) -> Score:
    """The Score of the program in a response."""
    code = solution_code(response_text, task.language, in_thinking=task.judge_thinking)
    if code is None or not code.strip():
        return Score(0.0, "no_answer", f"no closed ``` block of {task.language}")
    return judge_code(box, task, code)


def solution_code(text: str, language: str, *, in_thinking: bool) -> str | None:
    """The last closed block that is marked with the language; without one, the last block without a mark.

    in_thinking: whether blocks between <think> and </think> count.
    """
    if not in_thinking:
        text = answer_part(text)
    blocks = [(_language_of(info), code) for info, code in fenced_blocks(text)]
    for tags in (ALIASES[language], ("",)):
        for tag, code in reversed(blocks):
            if tag in tags:
                return code
    return None


def _language_of(info: str) -> str:
    """The first word of an info string: python for `python title=x`, `{.python}` and `Python:main.py`."""
    first = re.match(r"[{.\s]*([\w+#-]*)", info)
    return first[1].lower() if first else ""


def judge_code(box: Box | Remote, task: CodeTask, code: str) -> Score:
    """The Score of a solution's source text."""
    limits = Limits(cpu_s=task.time_s, memory_mb=task.memory_mb)
    if task.mode == "stdin":
        return _judge_stdin(box, task, code, limits)
    if task.mode == "function":
        return _judge_calls(box, task, code, limits)
    assert not isinstance(box, Remote) and task.language == "python"
    return _python_unit(box, task, code, limits)


def _judge_stdin(box: Box | Remote, task: CodeTask, code: str, limits: Limits) -> Score:
    start = ""
    if task.language == "python":
        sources = {"main.py": code} if not task.context.strip() else {
            "main.py": harness_source("load.py"), "context.py": task.context, "solution.py": code}
    elif task.language == "cpp":
        sources = {"main.cpp": f"{task.context}\n{code}" if task.context else code}
    else:
        source = java_source(task.context, code)
        classes = java_classes(source)
        sources, start = {classes.file: source}, classes.start
    program = _build(box, task, sources, limits, start)
    if isinstance(program, Outcome):
        return _failed(program, "compiling")
    for number, test in enumerate(task.tests, start=1):
        expected = str(test["output"])
        outcome = program(str(test["input"]).encode(), 2 * len(expected.encode()) + SLACK_BYTES)
        where = f"test {number} of {len(task.tests)}"
        if outcome.status != "ok":
            return _failed(outcome, where)
        if not same_output(outcome.stdout.decode(errors="replace"), expected, task.tolerance):
            return Score(0.0, "wrong", where)
    return verdict(True)


def _judge_calls(box: Box | Remote, task: CodeTask, code: str, limits: Limits) -> Score:
    """Makes all calls in one run of the program and compares each value here."""
    calls = [test["args"] for test in task.tests]
    sources, stdin = call_sources(task.language, task.context, code, task.entry_point, calls)
    if task.language != "python":
        program: Program | Outcome = _build(box, task, sources, limits, JAVA_MAIN)
    elif isinstance(box, Remote):
        start = ("import os, sys\nsys.path.insert(0, os.getcwd())\nimport serve\n"
                 f"serve.main('calls', {task.entry_point!r})\n")
        program = _build(box, task, {"main.py": start, **sources}, limits)
    else:
        program = Program(box, (*PYTHON, "/box/serve.py", "calls", task.entry_point), _encoded(sources), _deep(limits))
    if isinstance(program, Outcome):
        return _failed(program, "compiling")
    expected_bytes = len(json.dumps([[test["expected"], test["args"]] for test in task.tests], default=repr))
    outcome = program(stdin, 8 * expected_bytes + SLACK_BYTES)
    if outcome.status == "runtime_error" and outcome.message.startswith(SYNTAX_ERRORS):
        return _failed(outcome, "compiling", status="compile_error")
    values = read_values(outcome.stdout)
    for number, test in enumerate(task.tests, start=1):
        where = f"call {number} of {len(task.tests)}"
        if number > len(values):
            return _failed(outcome, where) if outcome.status != "ok" else Score(0.0, "wrong", f"{where}: no answer")
        answer, expected = values[number - 1], test["expected"]
        if "error" in answer:
            return Score(0.0, "runtime_error", f"{where}: {answer['error']}"[:300])
        in_place = answer["ok"] is None and expected is not None and "first" in answer
        if not same_value(answer["first"] if in_place else answer["ok"], expected, task.tolerance):
            return Score(0.0, "wrong", where)
    return verdict(True) if outcome.status == "ok" else _failed(outcome, "after the last call")


def _python_unit(box: Box, task: CodeTask, code: str, limits: Limits) -> Score:
    """Two sandboxes that talk to each other: the tests in one, the solution in the other."""
    shared = {name: harness_source(name) for name in ("peer.py", "load.py", "wire.py")}
    shared["context.py"] = task.context
    solution_files = _encoded({"solution.py": code, "serve.py": harness_source("serve.py"), **shared})
    tester_files = _encoded({"tests.py": task.tests, "tester.py": harness_source("tester.py"), **shared})
    to_solution, from_tester = os.pipe()
    to_tester, from_solution = os.pipe()
    ends = [to_solution, from_tester, to_tester, from_solution]
    try:
        with box.start([*PYTHON, "/box/serve.py", "unit", task.entry_point], solution_files, stdin=to_solution,
                       stdout=from_solution, limits=_deep(limits)) as solution, \
             box.start([*PYTHON, "/box/tester.py", task.entry_point], tester_files, stdin=to_tester,
                       stdout=from_tester, limits=limits) as test_run:
            while ends:
                os.close(ends.pop())  # each sandbox now holds the only copy of its ends: one's death ends the other
            with ThreadPoolExecutor(1) as watcher:
                solution_outcome = watcher.submit(solution.outcome, beside=test_run)
                try:
                    tested = test_run.outcome(beside=solution)
                finally:
                    if test_run.process.returncode != tester.GONE:  # else it has ended by itself, and why matters
                        solution.kill()
            solved, code_of_tests = solution_outcome.result(), test_run.process.returncode
    finally:
        for end in ends:
            with suppress(OSError):
                os.close(end)
    if tested.status == "ok":
        return verdict(True)
    if code_of_tests == tester.UNUSED:
        raise ValueError(f"{tested.message}: the tests judge nothing")
    if code_of_tests in FAILED_STATUS:
        return _failed(tested, "unit tests", status=FAILED_STATUS[code_of_tests])
    if code_of_tests != tester.GONE:
        return _failed(tested, "unit tests")
    if solution.process.returncode == load.NOT_PYTHON:
        return _failed(solved, "compiling", status="compile_error")
    ended_early = solved.status == "ok"
    return _failed(solved, "it ended before its tests did" if ended_early else "unit tests",
                   status="runtime_error" if ended_early else "")


def _deep(limits: Limits) -> Limits:
    """For serve.py, whose first thread calls the solution: its stack may take half of the memory."""
    return replace(limits, stack_mb=limits.memory_mb // 2)


def _build(box: Box | Remote, task: CodeTask, sources: Mapping[str, str], limits: Limits, main_class: str = "") -> Any:
    if isinstance(box, Remote):
        return box.program(task.language, sources, limits, compile_s=task.compile_s)
    return build(box, task.language, sources, limits, compile_s=task.compile_s, main_class=main_class)


def _failed(outcome: Outcome, where: str, *, status: str = "") -> Score:
    status = status or ("wrong" if outcome.status == "ok" else outcome.status)
    return Score(0.0, status, f"{where}: {outcome.message}"[:300])


def _encoded(sources: Mapping[str, str]) -> dict[str, bytes]:
    return {name: text.encode(errors="replace") for name, text in sources.items()}
