"""Five-shot arithmetic in plain text, for a small pretrained model (SmolLM2-135M): "...\\n12 + 9 =".

The answer is the rest of the line, so set rollout.stop to a newline and reward.routes.arithmetic=exact.
"""

from __future__ import annotations

import random

from megatron_rl.data.problems import MAX_DRAWS, Problem, in_split

__all__ = ["Arithmetic", "KINDS"]

SHOTS = {"3 + 4": 7, "25 + 31": 56, "80 - 23": 57, "6 * 7": 42, "12 + 9 - 4": 17}
KINDS = ("add_1_digit", "add_2_digit", "subtract_2_digit", "multiply_1_digit", "add_subtract")


class Arithmetic:
    """`size` problems, the five kinds equally often; problem i depends on (seed, i, split) only.

    metadata: {"kind": one of KINDS}. A problem that the shots already answer is never drawn.
    """

    domains = frozenset({"arithmetic"})

    def __init__(self, *, size: int, seed: int, split: str):
        self._size, self._seed, self._split = size, seed, split
        self._shots = "".join(f"{expression} = {answer}\n" for expression, answer in SHOTS.items())

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Problem:
        rng = random.Random(f"arithmetic:{self._seed}:{index}")
        kind = rng.choice(KINDS)
        for _ in range(MAX_DRAWS):
            expression, answer = _draw(rng, kind)
            if expression not in SHOTS and in_split(expression, self._split):
                return Problem(f"arithmetic-{self._split}-{self._seed}-{index}", f"{self._shots}{expression} =",
                               str(answer), "arithmetic", {"kind": kind})
        raise AssertionError(f"no {kind} problem in {self._split} after {MAX_DRAWS} draws")


def _draw(rng: random.Random, kind: str) -> tuple[str, int]:
    if kind == "add_1_digit":
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        return f"{a} + {b}", a + b
    if kind == "add_2_digit":
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        return f"{a} + {b}", a + b
    if kind == "subtract_2_digit":
        a, b = rng.randint(50, 99), rng.randint(10, 49)
        return f"{a} - {b}", a - b
    if kind == "multiply_1_digit":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return f"{a} * {b}", a * b
    a, b, c = rng.randint(5, 20), rng.randint(5, 20), rng.randint(1, 10)
    return f"{a} + {b} - {c}", a + b - c
