"""The trainer as the orchestrator commands it: start, train, save, finish (handoff/protocol.py)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from c3po import SumCount
from megatron_rl.config.load import to_dict
from megatron_rl.observe.timing import Timers
from megatron_rl.orchestrator import state
from megatron_rl.orchestrator.port import TrainerPort
from megatron_rl.orchestrator.stages import Stage
from megatron_rl.orchestrator.weights import PublishedWeights
from megatron_rl.types import StepResult

WRITTEN = "written."
"""Beginning of the name of a file that the ranks must see; the rest is drawn for each start."""


class Ranks:
    """loop.Ranks."""

    def __init__(self, port: TrainerPort, stage: Stage, weights: PublishedWeights):
        self._port, self._stage, self._weights = port, stage, weights
        self.steps_done = 0

    async def start(self, checkpoint: Path | None) -> None:
        """Has every rank see run.dir, build the policy and load the same checkpoint."""
        stage = self._stage
        written = Path(stage.config.run.dir, state.FOLDER, f"{WRITTEN}{secrets.token_hex(8)}")  # new: in nobody's cache
        written.write_text(os.uname().nodename)
        begun = await self._port.execute(
            "start", config=to_dict(stage.config), checkpoint=None if checkpoint is None else str(checkpoint),
            stage=stage.number, schedule_updates=stage.schedule_updates, reset_optimizer=stage.resets_optimizer,
            written=str(written))
        written.unlink(missing_ok=True)
        self.steps_done, self._weights.probe_tokens = begun["steps_done"], begun["probe_tokens"]

    async def train(self, step: int, timers: Timers) -> list[StepResult]:
        if self._stage.config.rollout.engine.colocate and self.steps_done == step:
            with timers("release"):
                await self._weights.make_room()
        trained = await self._port.execute("train", step=step)
        self.steps_done = step + 1
        timers.add(trained["seconds"])
        return [StepResult({key: SumCount(*pair) for key, pair in each["sums"].items()}, each["gauges"],
                           skipped=each["skipped"]) for each in trained["results"]]

    async def save(self, step: int, *, over: bool) -> None:
        await self._port.execute("save", step=step, loop_state=self._stage.state(over=over))

    async def finish(self, *, export_hf: bool) -> None:
        await self._port.execute("finish", export_hf=export_hf)
