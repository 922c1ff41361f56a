"""Claim: grading keeps pace with generation, because responses are graded while others are still being generated.

Responses finish at times drawn from a heavy-tailed length distribution; each is graded when it finishes. What grading
adds is the time from the last response's end to the last verdict. The anchor is the same grading begun when
all are there. Answers are those of the verifiers' test set, every one different, each time in a pool that saw none.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import Row, main, median
from benchmarks.workload import response_lengths
from megatron_rl.config.schema import RewardConfig
from megatron_rl.reward import RewardPool
from megatron_rl.types import Prompt, Score

ANSWERS = Path(__file__).resolve().parents[1] / "tests/megatron_rl/reward/answers.jsonl"
GENERATION_OVER_GRADING = 4.0  # generation takes this many times as long as grading all its responses


def items() -> list[tuple[Prompt, str]]:
    """The pairs of the test set that Math-Verify judges, in an order that spreads the slow ones."""
    rows = [row for row in map(json.loads, ANSWERS.read_text("utf-8").splitlines()) if row[0] == "math_verify"]
    random.Random(0).shuffle(rows)
    return [(Prompt(str(i), (1,), "question", reference, "math"), f"\\boxed{{{answer}}}")
            for i, (_, _, reference, answer, *_) in enumerate(rows)]


@contextmanager
def new_pool(workers: int) -> Iterator[RewardPool]:
    """A warm pool that remembers no verdict."""
    with RewardPool(RewardConfig(routes={"math": "math_verify"}, workers=workers, timeout_s=10.0)) as pool:
        pool.warm_up()
        pool.score_many([(Prompt("warm", (1,), "question", "\\frac{1}{3}", "math"), "\\boxed{0.25}")] * workers)
        yield pool


async def stream(pool: RewardPool, work: list[tuple[Prompt, str]], ends_s: list[float]) -> float:
    """Seconds from the last response's end to the last verdict."""
    started = time.perf_counter()

    async def one(prompt: Prompt, text: str, end_s: float) -> Score:
        await asyncio.sleep(max(0.0, end_s - (time.perf_counter() - started)))
        return await pool.score(prompt, text)

    await asyncio.gather(*(one(prompt, text, end) for (prompt, text), end in zip(work, ends_s, strict=True)))
    return max(0.0, time.perf_counter() - started - max(ends_s))


def measure(*, quick: bool, workers: int) -> tuple[list[Row], dict]:
    work, turns = (items()[:32], 1) if quick else (items(), 5)
    lengths = response_lengths(len(work), median=2000, spread=1.0, longest=24_000, seed=0)
    together, added = [], []
    for _ in range(turns):
        with new_pool(workers) as pool:
            started = time.perf_counter()
            pool.score_many(work)
            together.append(time.perf_counter() - started)
        span_s = GENERATION_OVER_GRADING * together[-1]
        with new_pool(workers) as pool:
            added.append(asyncio.run(stream(pool, work, [length / max(lengths) * span_s for length in lengths])))
    rows = [
        Row("verifiers: items per second, Math-Verify", len(work) / median(together), None, "/s"),
        Row("verifiers: seconds that grading adds to generation, against grading afterwards", median(added),
            median(together), "s", None if quick else 0.1),
    ]
    return rows, {"responses": len(work), "workers": workers, "together_s": together, "added_s": added,
                  "generation_over_grading": GENERATION_OVER_GRADING}


if __name__ == "__main__":
    main("verifiers", measure, workers=2)
