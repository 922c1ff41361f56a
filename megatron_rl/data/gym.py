"""Problems of reasoning-gym (0.1.25): about a hundred generators with their own answer checkers."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_rl.data.problems import MAX_DRAWS, Problem, in_split

__all__ = ["Gym"]

REFUSED = {
    "codeio": "it runs code shipped in its data inside this process",
    "composite": "it hides other tasks; name them one by one, in data.source=mix",
    "propositional_logic": "its checker gives full marks to a conclusion that repeats a premise",
}
EXAMPLES = {"graph_color": "possible_answer", "rubiks_cube": "example_correct_answer"}
"""Task without a reference answer -> the metadata that holds a right one."""


class Gym:
    """`size` problems of one task, domain "reasoning_gym"; problem i depends on (task, config, seed, i, split).

    metadata: {"task", "task_config", "entry"}, which the scorer of domain reasoning_gym needs. reasoning-gym seeds item
    i with seed + i, so neighbouring seeds would share items; data.seed is therefore hashed first. An item is replaced
    by item i of the next derived seed if it lies outside the split, or if no answer or every answer solves it.
    ValueError naming data.task or data.task_config.
    """

    domains = frozenset({"reasoning_gym"})

    def __init__(self, task: str, task_config: Mapping[str, Any], *, size: int, seed: int, split: str):
        _check_task(task)
        self._task, self._task_config = task, dict(task_config)
        self._size, self._seed, self._split = size, seed, split
        self._datasets = [self._dataset(draw=0)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Problem:
        for draw in range(MAX_DRAWS):
            if draw == len(self._datasets):
                self._datasets.append(self._dataset(draw))
            entry = self._datasets[draw][index]
            answer = _right_answer(self._task, entry)
            if _is_usable(self._task, entry, answer) and in_split(entry["question"], self._split):
                metadata = {"task": self._task, "task_config": self._task_config, "entry": entry}
                return Problem(f"{self._task}-{self._split}-{self._seed}-{index}", entry["question"],
                               answer or "", "reasoning_gym", metadata)
        raise ValueError(f"data.task={self._task} has too few distinct problems for data.split={self._split}")

    def _dataset(self, draw: int) -> Any:
        derived = hashlib.blake2b(f"{self._seed}:{draw}".encode(), digest_size=4).digest()
        try:
            return reasoning_gym.create_dataset(self._task, size=self._size,
                                                seed=int.from_bytes(derived, "big") >> 1, **self._task_config)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"data.task_config={self._task_config} does not fit data.task={self._task}: "
                             f"{error}") from error


def _check_task(task: str) -> None:
    if task in REFUSED:
        raise ValueError(f"data.task={task} is refused: {REFUSED[task]}")
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {len(DATASETS)}, such as chain_sum"
        raise ValueError(f"data.task={task} is no reasoning-gym dataset; {hint}")


def _right_answer(task: str, entry: Mapping[str, Any]) -> str | None:
    """The reference, or an example of a right answer; None for a task that has neither."""
    if task not in EXAMPLES:
        return entry["answer"]
    example = entry["metadata"][EXAMPLES[task]]
    return example if isinstance(example, str) else json.dumps(example)


def _is_usable(task: str, entry: Mapping[str, Any], answer: str | None) -> bool:
    """False for a blank answer, an integral that is unsolved or any constant, and a graph without edges."""
    if answer is None:
        return True
    if task == "graph_color":
        return bool(entry["metadata"]["puzzle"]["edges"])
    if task.endswith("_integration"):
        return "Integral" not in answer and re.search("[A-Za-z]", answer.replace("C", "")) is not None
    return bool(answer.strip())
