"""Two files for the general SFT of experiment=ring_lite_tiny, in the quick start's vocabulary, beside this file.

general.jsonl: rows of digits to copy, reverse, or take one of; the answer is the whole response.
replay.jsonl: worked sums of the training split, none answered directly, so that mathematics is not forgotten.
`python examples/ring_lite_tiny/problems.py` writes them again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from megatron_rl.data.chains import Chains, is_direct_answer

FOLDER = Path(__file__).resolve().parent
TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text, "reverse": lambda text: text[::-1], "first": lambda text: text[0],
    "last": lambda text: text[-1]}
GENERAL, REPLAY, REPLAY_SEED = 1200, 480, 11


def general() -> list[dict[str, str]]:
    """`Q:reverse:4721` -> `1274`; 3 to 5 digits, no problem twice."""
    rng, rows = random.Random("general"), {}
    while len(rows) < GENERAL:
        task, digits = rng.choice(list(TASKS)), "".join(rng.choices("0123456789", k=rng.randint(3, 5)))
        answer = TASKS[task](digits)
        rows[f"Q:{task}:{digits}\nA:"] = {"answer": answer, "response": answer, "domain": "general"}
    return [{"prompt": prompt, **row} for prompt, row in rows.items()]


def replay() -> list[dict[str, str]]:
    chains = Chains(size=2 * REPLAY, seed=REPLAY_SEED, split="train")
    worked = [problem for problem in map(chains.__getitem__, range(len(chains)))
              if not is_direct_answer(problem.response)]
    return [{"prompt": problem.text, "answer": problem.answer, "response": problem.response, "domain": "math"}
            for problem in worked[:REPLAY]]


def lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    (FOLDER / "general.jsonl").write_text(lines(general()), encoding="ascii")
    (FOLDER / "replay.jsonl").write_text(lines(replay()), encoding="ascii")
