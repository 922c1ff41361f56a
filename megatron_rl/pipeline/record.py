"""What is known of each stage, so that the same command goes on wherever the last one was stopped.

<stage>/stage.json is written whole or not at all: when the stage begins, and when its model has been evaluated. A
finished stage is not run again; one that began is, and goes on from its own checkpoints.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from megatron_rl.config.load import build
from megatron_rl.config.resume import changed
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.observe.files import write_json
from megatron_rl.pipeline.plan import Plan, Stage

__all__ = ["Record", "begin", "finish", "made_from", "read", "records", "unfinished"]

FILE = "stage.json"
MAY_DIFFER = ("observe.", "rollout.engine.", "slurm.", "pipeline.")
"""Keys, or beginnings of keys, that do not change what a stage makes, besides those of one start (config.resume)."""
SELECT_ASKS = ("data.", "eval.", "model.", "reward.", "rollout.", "run.seed", "select.")
"""What a selection depends on, of the configuration that it shares with the rl stage after it."""


@dataclass(frozen=True)
class Record:
    """One stage. after: made_from of its start, None for the base; starts: how often it was begun.

    evaluation: set -> values (docs/metrics.md); seconds: of the last start, in parts. Both empty until finished.
    """

    name: str
    recipe: str
    status: Literal["begun", "finished"]
    config: Config
    id: str
    after: str | None = None
    starts: int = 1
    model: str = ""
    evaluation: dict[str, object] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.status == "finished"


def read(stage: Stage) -> Record | None:
    """None for a stage that never began. ValueError names a file that is no record."""
    path = stage.folder / FILE
    if not path.is_file():
        return None
    try:
        return build(json.loads(path.read_text(encoding="utf-8")), Record)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record of a stage: {error}; remove {stage.folder} to run the stage again"
                         ) from error


def records(plan: Plan) -> list[Record | None]:
    """The records of every stage in order, checked.

    ValueError if a stage was made with another configuration or from another model. Only what is there is compared: a
    stage that began after one that is missing or unfinished counts as stale.
    """
    found = [read(stage) for stage in plan.stages]
    for place, (stage, record) in enumerate(zip(plan.stages, found, strict=True)):
        if record is None:
            continue
        _check_config(plan, place, record)
        require(record.after == made_from(plan, stage, found),
                f"{stage.folder} was made from an earlier result of stage {' or '.join(stage.sources)}: remove "
                f"{_folders(plan, place)} to run from there again")
    return found


def made_from(plan: Plan, stage: Stage, found: Sequence[Record | None]) -> str | None:
    """The ids of the records of its sources, joined by +. None for the base, and if one of them is not finished."""
    by_name = {each.name: record for each, record in zip(plan.stages, found, strict=True)}
    sources = [record for record in map(by_name.get, stage.sources) if record is not None and record.finished]
    return "+".join(each.id for each in sources) if sources and len(sources) == len(stage.sources) else None


def unfinished(found: Sequence[Record | None]) -> list[int]:
    """The places of the stages that are to run. With branches, finished ones may lie between them."""
    return [place for place, record in enumerate(found) if record is None or not record.finished]


def begin(stage: Stage, after: str | None, earlier: Record | None) -> Record:
    """Note that the stage starts; after: made_from; earlier: its record of a start that did not end."""
    id_, starts = (uuid.uuid4().hex, 1) if earlier is None else (earlier.id, earlier.starts + 1)
    return _write(stage, Record(stage.name, stage.recipe, "begun", stage.config, id_, after, starts))


def finish(stage: Stage, record: Record, evaluation: Mapping[str, Any], seconds: Mapping[str, float]) -> Record:
    return _write(stage, replace(record, status="finished", model=str(stage.model), evaluation=dict(evaluation),
                                 seconds=dict(seconds)))


def _write(stage: Stage, record: Record) -> Record:
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_json(stage.folder / FILE, asdict(record))
    return record


def _check_config(plan: Plan, place: int, record: Record) -> None:
    stage = plan.stages[place]
    differing = [row for row in changed(record.config, stage.config) if not row[0].startswith(MAY_DIFFER)
                 and (stage.recipe != "select" or row[0].startswith(SELECT_ASKS))]
    if not differing:
        return
    prefix = "" if stage.recipe == "base" else f"{stage.name}."
    shown = ", ".join(f"{prefix}{key}={now!r} (was {then!r})" for key, then, now in differing[:5])
    more = f" and {len(differing) - 5} more keys" if len(differing) > 5 else ""
    done = "is finished" if record.finished else "has begun"
    raise ValueError(f"stage {stage.name} {done} with another configuration: {shown}{more}. Give the earlier values, "
                     f"remove {_folders(plan, place)} to run again from there, or choose another run.dir")


def _folders(plan: Plan, place: int) -> str:
    """Those of the stage and of all that were made from it."""
    names = {plan.stages[place].name}
    for stage in plan.stages[place:]:
        if names & set(stage.sources):
            names.add(stage.name)
    return " ".join(str(stage.folder) for stage in plan.stages if stage.name in names and stage.folder.exists())
