"""Runs TrainStep.update. It dumps and counts steps that are not finite; too many of them in a row raise."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rl.config.load import to_dict
from megatron_rl.config.schema import Config
from megatron_rl.model.convert import Exporter
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.observe import dump
from megatron_rl.observe.dump import StepInputs, StepRecord
from megatron_rl.topology import Topology
from megatron_rl.train_step.step import TrainStep
from megatron_rl.trainer.export import export_adapters
from megatron_rl.types import StepResult


class GuardedStep:
    """Runs optimiser steps; every rank calls `update` alike. in_a_row: steps skipped since the last that was not.

    stage: index of the run's stage (dump.folder_of).
    """

    def __init__(self, config: Config, topology: Topology, step: TrainStep, exporter: Exporter, *, temperature: float,
                 stage: int | None = None):
        self._config, self._topology, self._step, self._exporter = config, topology, step, exporter
        self._temperature = temperature
        self._folder = dump.folder_of(config.run.dir, stage)
        self.in_a_row = 0

    def update(self, number: int, inputs: StepInputs, *, lr: float) -> StepResult:
        """Runs optimiser step `number` (from 1). Dumps it if run.dump_steps names it or if it is skipped.

        RuntimeError after more than run.max_skipped_in_a_row skipped steps in a row.
        """
        run = self._config.run
        dumping = number in run.dump_steps  # before the step, while the weights are those it starts from
        if dumping:
            self._write(number, inputs)
        result = self._step.update(inputs.microbatches, inputs.objective, lr=lr, balance_coef=inputs.balance_coef,
                                   z_loss_coef=inputs.z_loss_coef, counts=inputs.counts)
        if result.skipped and run.keep_dumps and not dumping:
            dumping = True
            self._write(number, inputs)
        if dumping:
            self._finish(number, result, lr)
        self.in_a_row = self.in_a_row + 1 if result.skipped else 0
        if self.in_a_row > run.max_skipped_in_a_row:
            look = f"`megatron-rl replay-step {self._folder}/step_{number:08d}` shows where it begins"
            raise RuntimeError(
                f"{self.in_a_row} optimiser steps in a row, up to step {number}, had a loss or a gradient that is NaN "
                f"or infinite (run.max_skipped_in_a_row={run.max_skipped_in_a_row}); no weight has changed since. "
                f"{look if run.keep_dumps else 'With run.keep_dumps above 0 they can be replayed'}")
        return result

    def _write(self, number: int, inputs: StepInputs) -> None:
        """Writes every rank's inputs, and the weights, which no skipped step has changed. With model.lora these are
        the adapters."""
        here = self._topology
        partial = here.broadcast_object(dump.start(self._folder, number) if here.is_main else None)
        dump.write_rank(partial, here.rank, inputs)
        if self._config.model.lora.on:
            export_adapters(self._config, self._step.policy, here, partial / dump.ADAPTER)
            return
        tensors = self._exporter()
        if here.is_main:
            source = Path(self._config.model.path)
            raw = json.loads((source / "config.json").read_text())
            write_hf_folder(partial / dump.WEIGHTS, {**raw, "torch_dtype": self._config.model.dtype}, tensors,
                            carried_from=source, mtp=self._config.model.mtp)
        else:
            for _ in tensors:
                pass
        here.barrier()

    def _finish(self, number: int, result: StepResult, lr: float) -> None:
        if self._topology.is_main:
            dump.finish(self._folder / f"step_{number:08d}.partial", StepRecord(
                step=number, skipped=result.skipped, lr=lr, temperature=self._temperature,
                loss=result.gauges["train/loss"], grad_norm=result.gauges["train/grad_norm"],
                config=to_dict(self._config)), keep=max(1, self._config.run.keep_dumps))
        self._topology.barrier()
