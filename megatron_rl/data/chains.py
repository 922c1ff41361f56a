"""The built-in task `chains`: add and subtract one-digit numbers, one worded step at a time.

    Q:3+7-1-9
    A: then3+7=10 so10-1=9 so9-9=0 so\\boxed{0}

Small enough for a model of 0.6M parameters and a vocabulary of 96. Each step opens with a random connective,
which keeps a floor under the policy's entropy; one answer in five is direct, so that lengths vary.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from megatron_rl.data.problems import MAX_DRAWS, Problem, in_split
from megatron_rl.types import RolloutGroup

__all__ = ["Chains", "answer_style", "chains_tokenizer", "is_direct_answer"]

CONNECTIVES = (" so", " then", " now", " next")
MIN_OPERANDS, MAX_OPERANDS = 2, 7
MINUS_SHARE = 0.4
DIRECT_SHARE = 0.2

END_OF_TEXT = "<|endoftext|>"
WORDS = ("\\boxed{", *CONNECTIVES, " check", " step", " is", " in", "f(", ")=", "\nA:", "Q:",
         " min", " sec", " cm", " mm", " km", " m", " h", " d", " g", " kg")
CHARACTERS = "0123456789+-*/=();:,.?}x \n" + "abcdefghijklmnopqrstuvwyz"
VOCABULARY_SIZE = 96


class Chains:
    """`size` problems of 2-7 operands with worked responses; problem i depends on (task_config, seed, i, split) only.

    task_config:
    - max_operands: draws the number of operands from 2 to this, so that the lengths of responses have a tail.
    - tail: the exponent a of that draw, a bounded Pareto law of density x^(-a-1). Default 0: log-uniform. The larger,
      the shorter is the median beside the longest.

    ValueError on anything else in it.
    """

    domains = frozenset({"math"})

    def __init__(self, *, size: int, seed: int, split: str, task_config: Mapping[str, Any] | None = None):
        self._size, self._seed, self._split = size, seed, split
        config = dict(task_config or {})
        self._longest, self._tail = config.get("max_operands"), config.get("tail", 0.0)
        whole = isinstance(self._longest, int) and self._longest >= MIN_OPERANDS
        if config and not (whole and config.keys() <= {"max_operands", "tail"}
                           and isinstance(self._tail, int | float) and 0 <= self._tail < math.inf):
            raise ValueError(f"data.task_config={config} does not fit data.source=chains, which knows max_operands, a "
                             f"whole number from {MIN_OPERANDS}, and beside it tail, a number from 0")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Problem:
        rng = random.Random(f"chains:{self._seed}:{index}")
        num_operands = self._num_operands(rng)
        for _ in range(MAX_DRAWS):
            expression, steps, total = _draw_chain(rng, num_operands)
            text = f"Q:{expression}\nA:"
            if in_split(text, self._split):
                response = _response(rng, steps, total)
                return Problem(f"chains-{self._split}-{self._seed}-{index}", text, str(total), "math",
                               {"num_operands": num_operands}, response)
        raise AssertionError(f"no chain of {num_operands} operands in {self._split} after {MAX_DRAWS} draws")

    def _num_operands(self, rng: random.Random) -> int:
        if self._longest is None:
            return rng.randint(MIN_OPERANDS, MAX_OPERANDS)
        share, ratio = rng.random(), (self._longest + 1) / MIN_OPERANDS
        if self._tail == 0:
            return int(MIN_OPERANDS * ratio ** share)
        return int(MIN_OPERANDS * (1 - share * (1 - ratio ** -self._tail)) ** (-1 / self._tail))


def _draw_chain(rng: random.Random, num_operands: int) -> tuple[str, list[str], int]:
    """(expression, worked steps, total); no running total is negative."""
    total = rng.randint(1, 9)
    expression, steps = str(total), []
    for _ in range(num_operands - 1):
        operand = rng.randint(1, 9)
        minus = total >= operand and rng.random() < MINUS_SHARE
        result = total - operand if minus else total + operand
        step = f"{'-' if minus else '+'}{operand}"
        steps.append(f"{total}{step}={result}")
        expression, total = expression + step, result
    return expression, steps, total


def _response(rng: random.Random, steps: list[str], total: int) -> str:
    box = f"\\boxed{{{total}}}"
    if rng.random() < DIRECT_SHARE:
        return box
    return "".join(rng.choice(CONNECTIVES) + part for part in [*steps, box])


def is_direct_answer(response_text: str) -> bool:
    """Whether a response states its answer at once, without a step before the box."""
    return response_text.lstrip().startswith("\\boxed")


def answer_style(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """A metric of this task (observe.metrics): the share of responses that answer at once, and how many of those that
    reason first are right."""
    judged = [(is_direct_answer(text), score.correct is True) for group in groups
              for text, score in zip(group.texts, group.scores, strict=True) if not score.failed]
    reasoned = [right for direct, right in judged if not direct]
    shares = {"direct_share": 1.0 - len(reasoned) / len(judged)}
    return shares | ({"reasoning_accuracy": sum(reasoned) / len(reasoned)} if reasoned else {})


def chains_tokenizer(path: str | Path) -> Any:
    """Writes the 96-token tokenizer, a transformers fast tokenizer, into the folder `path` and returns it.

    It covers digits, operators, lower-case letters and the words of WORDS; anything else reads as "?". End of text and
    padding are id 0.
    """
    from transformers import PreTrainedTokenizerFast  # seconds

    pieces = [END_OF_TEXT, *WORDS, *CHARACTERS]
    pieces += [f"<|reserved{index}|>" for index in range(len(pieces), VOCABULARY_SIZE)]
    longest_first = sorted([*WORDS, *CHARACTERS], key=len, reverse=True)
    pattern = "|".join(re.escape(piece) for piece in longest_first)
    tokenizer = Tokenizer(models.WordLevel(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
                                   clean_up_tokenization_spaces=False)
    fast.save_pretrained(path)
    return fast
