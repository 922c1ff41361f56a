"""The story of one step, told by the two programs that run it; nothing distributed in it.

The orchestrator decides and the trainer obeys. `orchestrate` runs in the orchestrator, once. It collects judged
responses, cuts them to the budget, offers the trainer what it trains on, and has the engines get the new weights.
`obey` runs in every rank of the trainer at the same time, and carries out one command after the other.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rl.batch import UnfillableStep
from megatron_rl.config.schema import Config
from megatron_rl.observe.timing import Timers
from megatron_rl.types import StepResult


class Rollouts(Protocol):
    """Judged responses, cut and scheduled for the trainer's ranks."""

    async def offer(self, step: int, timers: Timers) -> Any:
        """Lets the trainer pull what it trains on in `step`, and returns what the record needs to know of it.

        UnfillableStep if too few responses could be had.
        """
        ...


class Ranks(Protocol):
    """The trainer, as the orchestrator commands it. The trainer does not carry out a command a second time."""

    steps_done: int

    async def train(self, step: int, timers: Timers) -> list[StepResult]: ...

    async def save(self, step: int, *, over: bool) -> None: ...


class Weights(Protocol):
    """Has the trainer send the policy's weights to the engines, and each engine prove that it holds them."""

    async def publish(self, version: int) -> None: ...


class Record(Protocol):
    """Takes down a step's story: metrics, progress, held-out evaluation."""

    def step(self, step: int, offered: Any, results: list[StepResult], timers: Timers) -> None: ...

    async def evaluate(self, step: int, label: str) -> None: ...

    def over(self, step: int) -> bool:
        """Whether the run, or its stage, ends after `step` steps."""
        ...

    def stop_asked(self) -> bool:
        """Whether the run was asked to end early."""
        ...


class End(enum.Enum):
    """How a run, or one of its stages, ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    UNFILLABLE = "unfillable"


@dataclass(frozen=True)
class Ended:
    """why: for people, if there is more to say."""

    how: End
    why: str = ""


async def orchestrate(config: Config, *, rollouts: Rollouts, ranks: Ranks, weights: Weights, record: Record,
                      timers: Timers, first_step: int, evaluated: bool) -> Ended:
    """Steps first_step .. run.steps - 1. Version v of the weights is the policy after v steps.

    If the orchestrator was started again, the trainer may have trained first_step already (ranks.steps_done); its
    weights are then the next version. evaluated: the evaluation before the first step was made before such a restart.
    """
    if ranks.steps_done == first_step:
        await weights.publish(first_step)
    if first_step == 0 and not evaluated:
        await record.evaluate(0, "before_rl")
    for step in range(first_step, config.run.steps):
        with timers("step"):
            try:
                offered = await rollouts.offer(step, timers)
            except UnfillableStep as short:
                await record.evaluate(step, "after_rl")
                await ranks.save(step, over=False)
                return Ended(End.UNFILLABLE, str(short))
            results = await ranks.train(step, timers)
            with timers("publish"):
                await weights.publish(step + 1)
        record.step(step, offered, results, timers)
        done = step + 1
        over = record.over(done)
        if over or (config.eval.every_steps and done % config.eval.every_steps == 0):
            await record.evaluate(done, "after_rl" if over else "during")
        stopping = not over and record.stop_asked()
        if stopping or over or done % config.run.save_every_steps == 0:
            await ranks.save(done, over=over)
        if over or stopping:
            return Ended(End.FINISHED if over else End.STOPPED)
    return Ended(End.FINISHED)


class Trainer(Protocol):
    """One rank's part of every command; all ranks are given the same ones (handoff/protocol.py)."""

    def execute(self, command: dict[str, Any]) -> dict[str, Any]: ...


class Orders(Protocol):
    """Where commands come from and outcomes go."""

    def next(self) -> dict[str, Any]: ...

    def done(self, outcome: dict[str, Any]) -> None: ...


def obey(trainer: Trainer, orders: Orders) -> None:
    """Carries out start, then publish, (make_room,) train, publish, train, ... and saves now and then, until finish."""
    while True:
        command = orders.next()
        orders.done(trainer.execute(command))
        if command["kind"] == "finish":
            return
