"""Claim: isolation costs milliseconds a program. Programs per second and core in the sandbox, and over bare execution.

The anchor is the same program started with subprocess and nothing else, in turn with the sandbox in the same run.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.common import Row, interleaved, main, median, median_ratio
from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.human_eval import HumanEval
from megatron_rl.observe.versions import usable_cores
from megatron_rl.reward.code import CodeScorer
from megatron_rl.reward.languages import Program, build
from megatron_rl.reward.sandbox import Bubblewrap, Limits
from megatron_rl.types import Prompt

SOURCE = b"print(sum(map(int, input().split())))"
CPP = '#include <cstdio>\nint main() { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); }'
INPUT = b"1 2\n"
PYTHON = ["/usr/bin/python3", "-I"]


def in_sandbox(argv: list[str], files: dict[str, bytes]) -> Callable[[], None]:
    def run() -> None:
        outcome = Bubblewrap().run(argv, files, stdin=INPUT, limits=Limits())
        assert outcome.stdout == b"3\n", outcome
    return run


def bare(argv: list[str]) -> Callable[[], None]:
    def run() -> None:
        done = subprocess.run(argv, input=INPUT, capture_output=True, check=True)
        assert done.stdout == b"3\n", done
    return run


def throughput(function: Callable[[], Any], *, workers: int, seconds: float) -> float:
    """Calls per second on `workers` threads (each waits for a process of its own)."""
    until = time.perf_counter() + seconds

    def work() -> int:
        calls = 0
        while time.perf_counter() < until:
            function()
            calls += 1
        return calls

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(lambda _: work(), range(workers))) / seconds


def measure(*, quick: bool, repeats: int) -> tuple[list[Row], dict]:
    repeats, seconds, cores = (5, 0.5, usable_cores()) if quick else (repeats, 5.0, usable_cores())
    box = Bubblewrap()
    box.check()
    compiled = build(box, "cpp", {"main.cpp": CPP}, Limits(), compile_s=15)
    assert isinstance(compiled, Program), compiled
    python_box = in_sandbox([*PYTHON, "/box/main.py"], {"main.py": SOURCE})
    python_bare = bare([*PYTHON, "-c", SOURCE.decode()])
    turns = interleaved({"python": python_box, "python bare": python_bare,
                         "true": lambda: box.run(["/usr/bin/true"], {}, limits=Limits()),
                         "true bare": lambda: subprocess.run(["/usr/bin/true"], check=True),
                         "cpp": lambda: compiled(INPUT, 1 << 16)}, repeats=repeats)
    ms = {name: median(times) * 1e3 for name, times in turns.items()}
    scorer, problem = CodeScorer(RewardConfig()), HumanEval("all")[0]
    prompt = Prompt(problem.id, (1,), str(problem.text), problem.answer, problem.domain, problem.metadata)
    rates = {name: throughput(function, workers=cores, seconds=seconds) / cores for name, function in {
        "python": python_box, "bare": python_bare,
        "human_eval": lambda: scorer.score(prompt, problem.response)}.items()}
    rows = [
        Row("sandbox: milliseconds of a Python program, against bare", ms["python"], ms["python bare"], "ms"),
        Row("sandbox: what isolation adds to it", ms["python"] - ms["python bare"], None, "ms"),
        Row("sandbox: milliseconds of /usr/bin/true, against bare", ms["true"], ms["true bare"], "ms"),
        Row("sandbox: milliseconds of a compiled C++ program", ms["cpp"], None, "ms"),
        Row("sandbox: Python programs per second and core, against bare", rates["python"], rates["bare"], "/s"),
        Row("sandbox: HumanEval solutions judged per second and core", rates["human_eval"], None, "/s"),
    ]
    return rows, {"cores": cores, "milliseconds": ms, "per_second_and_core": rates,
                  "median_ratio": median_ratio(turns["python"], turns["python bare"])}


if __name__ == "__main__":
    main("sandbox", measure, repeats=100)
