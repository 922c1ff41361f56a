"""A taskset of verifiers: write a word backwards. Its environment is verifiers' own for a single agent."""

from __future__ import annotations

import random
from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["BackwardsTaskset"]

LETTERS, LENGTH, TASKS = "abcdefgh", 4, 2000


class Backwards(vf.TaskData):
    answer: str


class BackwardsTask(vf.Task[Backwards, vf.State]):
    @vf.reward
    async def letters(self, task: Backwards, trace: vf.Trace) -> float:
        """The share of letters that stand in their place."""
        said = trace.last_reply
        right = sum(ours == theirs for ours, theirs in zip(said, task.answer, strict=False))
        return right / max(len(said), len(task.answer))


class BackwardsTaskset(vf.Taskset[BackwardsTask, vf.TasksetConfig]):
    def load(self) -> Iterator[BackwardsTask]:
        rng = random.Random("backwards")
        for number in range(TASKS):
            word = "".join(rng.choices(LETTERS, k=LENGTH))
            yield BackwardsTask(Backwards(name=f"backwards {number}", prompt=f"A: {word} backwards",
                                          answer=word[::-1]), self.config.task)
