"""What an orchestrator leaves in <run.dir>/orchestrator for its successor, and for checkpoints.

    start.json   where the run began: the checkpoint that was chosen, and the stage
    step.bin     the step that was offered last: its shards, its metrics, and the state after collecting it
    end.json     how the run ended, written before the trainer is told to finish

The launcher removes the folder when it starts a run, and no older start writes into it (observe/lease.py), so every
file in it belongs to this start. Each file is whole or absent. A checkpoint of S steps holds the state after collecting
step S - 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.handoff import dump, load
from megatron_rl.loop import End, Ended
from megatron_rl.observe import lease
from megatron_rl.observe.files import write_bytes

FOLDER, START, STEP, END = "orchestrator", "start.json", "step.bin", "end.json"


@dataclass(frozen=True)
class Start:
    """How the run began. It is decided once, and checkpoints that the run writes later do not change it.

    stage, first_step, fresh: which stage it is (stages.stage_at). last_step: the step after which the stage ends.
    """

    checkpoint: str | None
    stage: int
    first_step: int
    fresh: bool
    last_step: int

    def write(self, folder: Path) -> None:
        _write_json(folder / START, asdict(self))


def read_start(folder: Path) -> Start | None:
    path = folder / START
    return Start(**json.loads(path.read_text())) if path.exists() else None


@dataclass(frozen=True)
class OfferedStep:
    """One step as it was handed over.

    - shards: by data-parallel rank.
    - metrics: what was measured of the sampling. samples: responses for people to read.
    - flops: model FLOPs of training on the step. generate_s: seconds of sampling.
    - collector: its state after this step.
    """

    step: int
    shards: list[bytes]
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    flops: float
    generate_s: float
    collector: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Eight bytes with the length of a body, the body of everything but the shards, and the shards as they are."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        body = dump({**fields, "shards": [len(shard) for shard in self.shards]})
        _write(folder / STEP, len(body).to_bytes(8, "little"), body, *self.shards)


def read_offered(folder: Path) -> OfferedStep | None:
    path = folder / STEP
    if not path.exists():
        return None
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    state = load(content[8:begin])
    ends = list(itertools.accumulate(state["shards"], initial=begin))
    return OfferedStep(**{**state, "shards": [content[start:end] for start, end in itertools.pairwise(ends)]})


def write_end(folder: Path, ended: Ended, *, is_last: bool) -> None:
    """is_last: no further stage of the run is left."""
    _write_json(folder / END, {"how": ended.how.value, "why": ended.why, "is_last": is_last})


def read_end(folder: Path) -> tuple[Ended, bool] | None:
    path = folder / END
    if not path.exists():
        return None
    end = json.loads(path.read_text())
    return Ended(End(end["how"]), end["why"]), end["is_last"]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, (json.dumps(value, indent=2) + "\n").encode())


def _write(path: Path, *parts: bytes) -> None:
    write_bytes(path, *parts, allowed=lambda: lease.check(path.parent.parent))
