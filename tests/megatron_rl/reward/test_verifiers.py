"""Answers with known verdicts, through the pool; answers.jsonl: [scorer, kind, reference, answer, whether right]."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_rl.config.schema import RewardConfig
from megatron_rl.reward import RewardPool
from megatron_rl.reward.boxed import last_boxed
from megatron_rl.types import Prompt

ROWS = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text("utf-8").splitlines()]
ROUTES = {"math_verify": "math_verify", "science": "science"}
DEEP = 3000
BOMBS = [("math_verify", bomb) for bomb in (
    "9^{9^{9^{9}}}", "99999999!", "123456789^{123456789}", "2^{2^{2^{2^{2^{2}}}}}",
    "(" * DEEP + "1" + ")" * DEEP, "\\sqrt{" * 400 + "2" + "}" * 400, "\\frac{1}{" * 300 + "2" + "}" * 300,
    "\\text{" * DEEP + "a" + "}" * DEEP, "\\binom{10^9}{5\\cdot 10^8}", "\\prod_{k=1}^{10^9} k",
    "(x+1)^{100000}", "\\sin(\\cos(\\tan(10^{10^{10}})))",
    "1" * 200_000, "x+" * 20_000 + "x", "\\{" + ",".join(map(str, range(20_000))) + "\\}",
    "\\int_0^{10^9} e^{x^2 \\sin x^x} dx", "0." + "3" * 100_000)] + [("science", bomb) for bomb in (
        "5 m^9999999999", "5 m^(9^9^9)", "1" * 100_000 + " km", "1e999999999 m", "1 " + "m*" * 39 + "m")]


def prompt(answer: str, scorer: str) -> Prompt:
    return Prompt("p", (1,), "question", answer, scorer)


def boxed(answer: str) -> str:
    return f"It follows that \\boxed{{{answer}}}."


def test_the_set_is_large_and_every_answer_can_be_boxed():
    assert len(ROWS) >= 200 and len(BOMBS) >= 20
    assert len({tuple(row[:4]) for row in ROWS}) == len(ROWS)
    assert all(last_boxed(boxed(row[3])) == row[3].strip() for row in ROWS)
    assert len({row[1] for row in ROWS}) >= 12


@pytest.mark.slow
def test_verdicts_are_the_known_ones():
    with RewardPool(RewardConfig(routes=ROUTES, timeout_s=20)) as pool:
        pool.warm_up()
        started = time.perf_counter()
        scores = pool.score_many([(prompt(reference, scorer), boxed(answer))
                                  for scorer, _, reference, answer, _ in ROWS])
        seconds = time.perf_counter() - started
    assert {score.status for score in scores} == {"correct", "wrong"}
    print(f"\nverifiers: {len(ROWS)} verdicts, {len(ROWS) / seconds:.0f} items/s on 2 workers")
    assert [row for row, score in zip(ROWS, scores, strict=True) if (score.value == 1) != row[4]] == []


@pytest.mark.slow
def test_a_bomb_costs_its_own_slot_and_no_honest_answer():
    limit_s = 1.0
    items = [item for scorer, bomb in BOMBS for item in (
        (prompt("1 km" if scorer == "science" else "\\frac{1}{2}", scorer), boxed(bomb)),
        (prompt("\\frac{2}{3}", "math_verify"), boxed(f"\\frac{{{2 * len(bomb)}}}{{{3 * len(bomb)}}}")))]
    with RewardPool(RewardConfig(routes=ROUTES, timeout_s=limit_s)) as pool:
        pool.warm_up()
        started = time.perf_counter()
        scores = pool.score_many(items)
        seconds = time.perf_counter() - started
    bombs, honest = scores[::2], scores[1::2]
    print(f"\nbombs: {dict(Counter(score.status for score in bombs))} in {seconds:.1f} s")
    assert all(score.value == 0 and score.status in ("wrong", "timeout", "error") for score in bombs)
    assert {score.status for score in honest} == {"correct"}
    assert sum(score.status == "timeout" for score in bombs) >= 3
    assert seconds < len(BOMBS) * 20.0  # of a bomb without a limit: for ever
