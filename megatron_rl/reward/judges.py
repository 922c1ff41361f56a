"""Judges one program by its tests; runs in a worker of the reward pool, the program in a sandbox.

What the right answers are never enters the sandbox of a program that is asked for values or for output: they are
compared here. Python unit tests run in a second sandbox, beside the solution's. Unit tests of C++ and Java are one
program with the solution and have passed when a line that only their harness knows has been printed at the end.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from megatron_rl.reward.base import verdict
from megatron_rl.reward.calls import call_sources, harness_source, read_values
from megatron_rl.reward.compare import same_output, same_value
from megatron_rl.reward.harness import serve, tester
from megatron_rl.reward.languages import PYTHON, Program, build, java_class
from megatron_rl.reward.remote import Remote
from megatron_rl.reward.sandbox import Limits, Outcome
from megatron_rl.types import Score

if TYPE_CHECKING:
    from megatron_rl.reward.code import CodeTask
    from megatron_rl.reward.languages import Box

__all__ = ["judge_code"]

SLACK_BYTES = 1 << 16
SYNTAX_ERRORS = ("SyntaxError", "IndentationError", "TabError")
FAILED_STATUS = {tester.FAILED: "wrong", tester.RAISED: "runtime_error"}
CPP_MAIN = "#define main tests_main\n{tests}\n#undef main\n#include <cstdio>\n" \
           'int main() {{ int code = tests_main(); if (code == 0) std::puts("\\n{token}"); return code; }}\n'
JAVA_MAIN = "public class Harness {{ public static void main(String[] arguments) throws Throwable {{ " \
            '{tests}.main(arguments); System.out.println("\\n{token}"); }} }}\n'


def judge_code(box: Box | Remote, task: CodeTask, code: str) -> Score:
    """The Score of a solution's source text."""
    limits = Limits(cpu_s=task.time_s, memory_mb=task.memory_mb)
    if task.mode == "stdin":
        return _judge_stdin(box, task, code, limits)
    if task.language == "python":
        code = _whole(task, code)
        if task.mode == "unit":
            return _python_unit_remote(box, task, code, limits) if isinstance(box, Remote) else _python_unit(
                box, task, code, limits)
    return _judge_calls(box, task, code, limits) if task.mode == "function" else _judge_unit(box, task, code, limits)


def _whole(task: CodeTask, code: str) -> str:
    """The context with the solution: after it where it defines the function itself, else as its continuation."""
    if not task.context:
        return code
    defines = re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(task.entry_point)}\b", code, re.MULTILINE)
    return f"{task.context}\n\n{code}" if defines else task.context + code


def _judge_stdin(box: Box | Remote, task: CodeTask, code: str, limits: Limits) -> Score:
    source = f"{task.context}\n{code}" if task.context else code
    name = {"python": "main.py", "cpp": "main.cpp", "java": f"{java_class(source)}.java"}[task.language]
    program = _build(box, task, {name: source}, limits)
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
    """All calls in one run of the program, each value compared here."""
    calls = [test["args"] for test in task.tests]
    sources, stdin = call_sources(task.language, task.context, code, task.entry_point, calls)
    if isinstance(box, Remote) and task.language == "python":
        start = f"import os, sys\nsys.path.insert(0, os.getcwd())\nimport serve\nserve.main({task.entry_point!r})\n"
        sources = {"main.py": start, **sources}
    if task.language == "python" and not isinstance(box, Remote):
        program: Program | Outcome = Program(box, (*PYTHON, "/box/serve.py", task.entry_point),
                                             _encoded(sources), limits)
    else:
        program = _build(box, task, sources, limits, main_class="Harness")
    if isinstance(program, Outcome):
        return _failed(program, "compiling")
    expected_bytes = len(json.dumps([test["expected"] for test in task.tests], default=repr))
    outcome = program(stdin, 8 * expected_bytes + SLACK_BYTES)
    if outcome.status == "runtime_error" and outcome.message.startswith(SYNTAX_ERRORS):
        return _failed(outcome, "compiling", status="compile_error")
    values = read_values(outcome.stdout)
    for number, test in enumerate(task.tests, start=1):
        where = f"call {number} of {len(task.tests)}"
        if number > len(values):
            return _failed(outcome, where) if outcome.status != "ok" else Score(0.0, "wrong", f"{where}: no answer")
        answer = values[number - 1]
        if "error" in answer:
            return Score(0.0, "runtime_error", f"{where}: {answer['error']}"[:300])
        if not same_value(answer.get("ok"), test["expected"], task.tolerance):
            return Score(0.0, "wrong", where)
    return verdict(True) if outcome.status == "ok" else _failed(outcome, "after the last call")


def _judge_unit(box: Box | Remote, task: CodeTask, code: str, limits: Limits) -> Score:
    token = secrets.token_hex(16)
    if task.language == "cpp":
        sources = {"main.cpp": f"{task.context}\n{code}\n{CPP_MAIN.format(tests=task.tests, token=token)}"}
    else:
        solution, tests = f"{task.context}\n{code}", java_class(task.tests)
        sources = {f"{java_class(solution)}.java": solution, f"{tests}.java": task.tests,
                   "Harness.java": JAVA_MAIN.format(tests=tests, token=token)}
    program = _build(box, task, sources, limits, main_class="Harness")
    if isinstance(program, Outcome):
        return _failed(program, "compiling")
    outcome = program(b"", SLACK_BYTES)
    if outcome.status == "ok":
        return verdict(outcome.stdout.rstrip().endswith(b"\n" + token.encode()))
    said_so = re.search(rb"[Aa]ssert", outcome.stderr)
    return _failed(outcome, "unit tests", status="wrong" if said_so and outcome.status == "runtime_error" else "")


def _python_unit_remote(box: Remote, task: CodeTask, code: str, limits: Limits) -> Score:
    """A remote judge runs one program at a time, so solution and tests share it, as in C++."""
    token = secrets.token_hex(16)
    source = f"{code}\n\n{task.tests}\n\nif 'check' in globals():\n    check({task.entry_point})\nprint('\\n{token}')\n"
    program = _build(box, task, {"main.py": source}, limits)
    assert not isinstance(program, Outcome)
    outcome = program(b"", SLACK_BYTES)
    if outcome.status == "ok":
        return verdict(outcome.stdout.rstrip().endswith(b"\n" + token.encode()))
    failed = outcome.status == "runtime_error" and "AssertionError" in outcome.message
    return _failed(outcome, "unit tests", status="wrong" if failed else "")


def _python_unit(box: Box, task: CodeTask, code: str, limits: Limits) -> Score:
    """Two sandboxes that talk to each other: the tests in one, the solution in the other."""
    solution_files = _encoded({"solution.py": code, "serve.py": harness_source("serve.py"),
                               "wire.py": harness_source("wire.py")})
    tester_files = _encoded({"context.py": task.context, "tests.py": task.tests,
                             "tester.py": harness_source("tester.py"), "wire.py": harness_source("wire.py")})
    to_solution, from_tester = os.pipe()
    to_tester, from_solution = os.pipe()
    ends = [to_solution, from_tester, to_tester, from_solution]
    try:
        with box.start([*PYTHON, "/box/serve.py", task.entry_point], solution_files, stdin=to_solution,
                       stdout=from_solution, limits=limits) as solution, \
             box.start([*PYTHON, "/box/tester.py", task.entry_point], tester_files, stdin=to_tester,
                       stdout=from_tester, limits=limits) as test_run:
            while ends:
                os.close(ends.pop())  # each sandbox now holds the only copy of its ends: one's death ends the other
            outcomes: list[Outcome] = []
            watcher = threading.Thread(target=lambda: outcomes.append(solution.outcome()))
            watcher.start()
            try:
                tested = test_run.outcome()
            finally:
                if test_run.process.returncode != tester.GONE:  # else it has ended by itself, and why is of interest
                    solution.kill()
                watcher.join()
            code_of_tests = test_run.process.returncode
    finally:
        for end in ends:
            with suppress(OSError):
                os.close(end)
    if tested.status == "ok":
        return verdict(True)
    if code_of_tests in FAILED_STATUS:
        return _failed(tested, "unit tests", status=FAILED_STATUS[code_of_tests])
    if code_of_tests != tester.GONE:
        return _failed(tested, "unit tests")
    if solution.process.returncode == serve.NOT_PYTHON:
        return _failed(outcomes[0], "compiling", status="compile_error")
    ended_early = outcomes[0].status == "ok"
    return _failed(outcomes[0], "it ended before its tests did" if ended_early else "unit tests",
                   status="runtime_error" if ended_early else "")


def _build(box: Box | Remote, task: CodeTask, sources: Mapping[str, str], limits: Limits, *,
           main_class: str = "") -> Any:
    first = next(iter(sources))
    main_class = main_class if "Harness.java" in sources else first.removesuffix(".java")
    if isinstance(box, Remote):
        return box.program(task.language, sources, limits, compile_s=task.compile_s)
    return build(box, task.language, sources, limits, compile_s=task.compile_s, main_class=main_class)


def _failed(outcome: Outcome, where: str, *, status: str = "") -> Score:
    status = status or ("wrong" if outcome.status == "ok" else outcome.status)
    return Score(0.0, status, f"{where}: {outcome.message}"[:300])


def _encoded(sources: Mapping[str, str]) -> dict[str, bytes]:
    return {name: text.encode(errors="replace") for name, text in sources.items()}
