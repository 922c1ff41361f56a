"""Claims: the orchestrator's cost is linear in a step's tokens, and a fifth of what rank 0 paid before there was one.

A stub that answers as SGLang 0.5.23 does feeds the orchestrator's own parts with a step of ring_lite_rl_stage1, as
fast as it takes the answers: 8,192 responses, log-normal, 12,800 tokens on average, onto 256 ranks; or a fraction of
both. The judges work in processes of their own and are counted apart. Measured for each size, in a fresh process:

- processor seconds of the orchestrator, from the first request to the last shard that a rank has read;
- the growth of its memory, at its peak;
- how late a task wakes that sleeps 5 ms: the stalls of the event loop, under full load;
- the bytes that each rank reads, over the bytes of the token ids, masks and log-probabilities that it trains on.

The anchor is a stored figure: rank 0 of commit adb3946, which had no orchestrator, measured once (docs/performance.md
says how and where). Its code is not kept here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from shutil import copyfile
from typing import Any

from benchmarks.common import Row, in_fresh_process, main
from benchmarks.sglang_stub import Lengths, StubProcess, make_tokenizer
from megatron_rl.model.architectures import HF_FILES

VOCABULARY = 126_464
LENGTHS = Lengths(median=11_720, spread=0.5)
"""Cut at rollout.max_response_tokens = 22,528, the mean is 12,800."""
RANK_0_CPU_S_PER_MTOKEN = 2.11
"""Measured at commit adb3946 and 1/32 of a step: the lowest of four figures, 2.11 to 3.75 as the load changed.
That one still counts the threads that feed the judges; docs/performance.md has all four."""


def measured_step(*arguments: Any) -> dict[str, Any]:
    """In a fresh process: orchestrator_step.measured_step, whose imports no other process needs."""
    from benchmarks.orchestrator_step import measured_step

    return measured_step(*arguments)


def measure(*, quick: bool, largest: int) -> tuple[list[Row], dict[str, Any]]:
    sizes = [1 / 512, 1 / 256] if quick else [1 / (8 * largest), 1 / (4 * largest), 1 / (2 * largest), 1 / largest]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copyfile(HF_FILES / "ling_lite.json", folder / "config.json")
        make_tokenizer(VOCABULARY).save(str(folder / "tokenizer.json"))
        with StubProcess(folder / "tokenizer.json", LENGTHS) as stub:
            steps = [in_fresh_process(measured_step, folder, stub.url, size, "sync") for size in sizes]
            budgeted = in_fresh_process(measured_step, folder, stub.url, sizes[-1], "budgeted")
    first, last = steps[0], steps[-1]
    rows = [Row(f"orchestrator: CPU seconds per million tokens, 1/{round(1 / step['fraction'])} of a step",
                step["cpu_s_per_mtoken"], RANK_0_CPU_S_PER_MTOKEN, "s", None if quick or step is not last else 0.2)
            for step in steps]
    rows += [
        Row("orchestrator: the same with rollout.collector=budgeted", budgeted["cpu_s_per_mtoken"], None, "s"),
        Row("orchestrator: CPU seconds per token, largest step against smallest", last["cpu_s_per_mtoken"],
            first["cpu_s_per_mtoken"], "s", None if quick else 1.2),
        Row("orchestrator: memory per token, largest step against smallest", last["bytes_per_token"],
            first["bytes_per_token"], "B", None if quick else 1.2),
        *[Row(f"orchestrator: event loop late under full load ({step['responses']} responses, {name}), 99.9th "
              "percentile", step["late_ms_p999"], None, "ms", None if quick else 100.0)
          for name, step in (("sync", last), ("budgeted", budgeted))],
        Row("orchestrator: bytes that a rank reads, over its own tokens' arrays", max(
            step["read_over_own"] for step in steps), None, "", 1.1),
        Row("orchestrator: largest share of the step that one rank reads, times ranks",
            last["largest_share_read"] * last["ranks"], None, ""),
    ]
    return rows, {"steps": steps, "budgeted": budgeted}


if __name__ == "__main__":
    main("orchestrator_scale", measure, largest=16)
