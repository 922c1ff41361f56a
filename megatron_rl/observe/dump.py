"""One optimiser step on disk, so that it can be run again: what every rank was given, and what came of it.

    step_00000003/  step.json        the StepRecord
                    rank_00000.pt    that rank's StepInputs, one file for each
                    weights/         the policy before the step, a Hugging Face folder; with model.lora
                    adapter/         its adapters instead, and model.path stays the base

Written under a name that ends in .partial and renamed when it is whole. Nothing distributed in here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.observe.files import write_json
from megatron_rl.types import PackedMicrobatch

ADAPTER = "adapter"
WEIGHTS, RECORD, RESULT = "weights", "step.json", "replay.json"  # the last is what a replay writes
_NAME = re.compile(r"^step_\d{8}$")


@dataclass(frozen=True)
class StepInputs:
    """All that one rank's part of an optimiser step depends on besides weights and configuration.

    objective: the TokenLoss; it is pickled with its class, so it must be defined in a module. counts: of
    the counting pass (model.router.RoutingCounts), None without one.
    """

    microbatches: list[PackedMicrobatch]
    objective: Any
    counts: Any
    balance_coef: float
    z_loss_coef: float


@dataclass(frozen=True)
class StepRecord:
    """step: number of the optimiser step, from 1. temperature: of the log-probabilities. config: the run's, as
    plain values. loss, grad_norm: what the run got."""

    step: int
    skipped: bool
    lr: float
    temperature: float
    loss: float
    grad_norm: float
    config: dict[str, Any]


def folder_of(run_dir: str, stage: int | None = None) -> Path:
    """Where a run's dumps go. stage: the index of the run's stage, since each may count its optimiser steps from 1."""
    folder = Path(run_dir) / "dumps"
    return folder if stage is None else folder / f"stage_{stage}"


def start(folder: Path, step: int) -> Path:
    """The empty partial folder of a dump under `folder`; one process calls this before any rank writes."""
    partial = folder / f"step_{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_rank(partial: Path, rank: int, inputs: StepInputs) -> None:
    with open(partial / _rank_file(rank), "wb") as file:
        torch.save(inputs, file)
        file.flush()
        os.fsync(file.fileno())


def finish(partial: Path, record: StepRecord, *, keep: int) -> Path:
    """Make the dump whole and drop the oldest beyond `keep`; one process calls this when all ranks have written."""
    write_json(partial / RECORD, dataclasses.asdict(record))
    final = partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    whole = sorted((path for path in final.parent.iterdir() if _NAME.match(path.name)),
                   key=lambda path: path.stat().st_mtime)
    for path in whole[:-keep]:
        shutil.rmtree(path)
    return final


def read_record(folder: Path) -> StepRecord:
    """ValueError when `folder` is not a whole dump."""
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder} is not the dump of a step: there is no {RECORD} in it "
                         "(dumps are in <run.dir>/dumps; one that ends in .partial was not finished)")
    return StepRecord(**json.loads(path.read_text(encoding="utf-8")))


def read_rank(folder: Path, rank: int, device: torch.device) -> StepInputs:
    """Pickled: read only dumps that you trust."""
    return torch.load(folder / _rank_file(rank), map_location=device, weights_only=False)


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"
