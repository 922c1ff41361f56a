"""Claim: micro-batches hold almost no padding, ranks get equal work, and planning a large step takes no time.

8,192 heavy-tailed responses on 64 data-parallel ranks, Ling-lite's cost of attention. The anchor of the padding is
what a padded batch of the same sequences would hold: the same sorting and the same cap, every sequence padded to the
longest of its micro-batch.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict

import numpy as np

from benchmarks.common import Row, main, median
from benchmarks.workload import response_lengths
from megatron_rl.batch import plan_microbatches
from megatron_rl.model.architectures import HF_FILES, parse_config
from megatron_rl.observe.flops import attention_balance_tokens, forward_flops

CAP, ALIGN, PROMPT_TOKENS = 24_576, 8, (64, 512)


def padded_tokens(lengths: list[int]) -> int:
    """Tokens of padded micro-batches: longest first, as many of a kind as fit under the cap."""
    ordered, total = sorted(lengths, reverse=True), 0
    while ordered:
        count = min(len(ordered), max(1, CAP // ordered[0]))
        total += count * ordered[0]
        ordered = ordered[count:]
    return total


def measure(*, quick: bool, ranks: int, responses: int) -> tuple[list[Row], dict]:
    if quick:
        ranks, responses = 8, 512
    path = HF_FILES / "ling_lite.json"
    config = asdict(parse_config(json.loads(path.read_text(encoding="utf-8")), str(path)))
    prompts = np.random.default_rng(1).integers(*PROMPT_TOKENS, responses)
    lengths = (response_lengths(responses, median=2000, spread=1.0, longest=CAP - PROMPT_TOKENS[1], seed=0)
               + prompts).tolist()
    seconds = []
    for _ in range(2 if quick else 9):
        started = time.perf_counter()
        plan = plan_microbatches(lengths, dp_size=ranks, tokens_per_microbatch=CAP, align=ALIGN,
                                 attention_tokens=attention_balance_tokens(config))
        seconds.append(time.perf_counter() - started)
    packed = sum(max(1, math.ceil(sum(lengths[i] for i in members) / ALIGN)) * ALIGN
                 for rank in plan for members in rank)
    work = np.array([[forward_flops(config, [lengths[i] for i in members]) for members in rank] for rank in plan],
                    dtype=float)
    per_rank = work.sum(1)
    rows = [
        Row("packing: real tokens over tokens computed", sum(lengths) / packed, None, "", 0.99, "at least"),
        Row("packing: tokens computed against padded micro-batches", packed, padded_tokens(lengths), "tokens"),
        Row("packing: FLOPs of a rank, max over mean", per_rank.max() / per_rank.mean(), None, "", 1.02),
        Row("packing: sum over micro-batches of the slowest rank, over mean", work.max(0).sum() / per_rank.mean()),
        Row("packing: planning time", median(seconds) * 1e3, None, "ms", None if quick else 100.0),
    ]
    return rows, {"ranks": ranks, "responses": responses, "tokens": sum(lengths), "microbatches_per_rank": len(plan[0]),
                  "planning_seconds": seconds}


if __name__ == "__main__":
    main("packing", measure, ranks=64, responses=8192)
