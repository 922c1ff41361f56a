"""Gives the rows of a run's files to a logger (wandb, or one of the user's own), in a process of its own, so that
nothing that happens to the logger (it is killed, hangs, raises, or its service refuses) reaches the run. sinks.py
starts it:

    python -P feed.py SETTINGS.json    settings of the run, and the file positions to begin at

It ends when its standard input does: after a byte `0` the run was well, otherwise it failed. It imports nothing of
ours, because torch would come with it.
"""

from __future__ import annotations

import importlib
import json
import select
import signal
import sys
from pathlib import Path
from typing import Any, Protocol

LOOK_EVERY_S = 1.0


class Logger(Protocol):
    """What observe.loggers names: a class, which is made as Logger(run_dir, config)."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of one step (names of docs/metrics.md), or of one evaluation (eval/...)."""

    def close(self, finished: bool) -> None:
        """The run is over. finished: it did not fail."""


class Wandb:
    """wandb's x axis is `step`."""

    def __init__(self, init: dict[str, Any]):
        import wandb  # it takes a second and starts a process

        self._run = wandb.init(**init, settings=wandb.Settings(console="off", silent=True))
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def logger_of(options: dict) -> Logger:
    if "wandb" in options:
        return Wandb(options["wandb"])
    sys.path[:] = options["sys_path"]
    module, _, name = options["logger"].rpartition(".")
    return getattr(importlib.import_module(module), name)(Path(options["directory"]), options["config"])


def rows_of(path: Path, position: int) -> tuple[list[dict], int]:
    """Whole rows from byte `position` on, and the position after them."""
    if not path.exists():
        return [], position
    with path.open("rb") as file:
        file.seek(position)
        lines, newline, _ = file.read().rpartition(b"\n")
    return [json.loads(line) for line in lines.splitlines()], position + len(lines + newline)


def numbers(name: str, row: dict) -> dict:
    """What a logger is told of a row of metrics.jsonl or eval.jsonl."""
    values = {key: value for key, value in row.items() if key not in ("time", "label", "step")}
    if name == "eval.jsonl":
        values = {f"eval/{key}": value for key, value in values.items() if isinstance(value, int | float)}
    return values


def feed(options: dict) -> None:
    logger = logger_of(options)
    positions, well, open_ = dict(options["positions"]), False, True
    while open_:
        if select.select([sys.stdin], [], [], LOOK_EVERY_S)[0]:
            byte = sys.stdin.buffer.raw.read(1)
            well, open_ = well or byte == b"0", byte != b""
        for name in positions:
            found, positions[name] = rows_of(Path(options["directory"]) / name, positions[name])
            for row in found:
                logger.log(row["step"], numbers(name, row))
    logger.close(well)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a request to stop goes to the run, which ends this
        signal.signal(number, signal.SIG_IGN)
    feed(json.loads(Path(sys.argv[1]).read_text()))
