"""Gives the rows of a run's files to wandb, in a process of its own, so that nothing that happens to wandb (its service
is killed, hangs, or refuses) reaches the run. sinks.py starts it:

    python -P wandb_feed.py SETTINGS.json    settings of the run, and the file positions to begin at

It ends when its standard input does: after a byte `0` the run was well, otherwise it failed. It imports nothing of
ours, because torch would come with it.
"""

from __future__ import annotations

import json
import select
import signal
import sys
from pathlib import Path

LOOK_EVERY_S = 1.0


def rows_of(path: Path, position: int) -> tuple[list[dict], int]:
    """Whole rows from byte `position` on, and the position after them."""
    if not path.exists():
        return [], position
    with path.open("rb") as file:
        file.seek(position)
        lines, newline, _ = file.read().rpartition(b"\n")
    return [json.loads(line) for line in lines.splitlines()], position + len(lines + newline)


def numbers(name: str, row: dict) -> dict:
    """What wandb is told of a row of metrics.jsonl or eval.jsonl."""
    values = {key: value for key, value in row.items() if key not in ("time", "label", "step")}
    if name == "eval.jsonl":
        values = {f"eval/{key}": value for key, value in values.items() if isinstance(value, int | float)}
    return {"step": row["step"], **values}


def feed(options: dict) -> None:
    import wandb  # it takes a second and starts a process

    run = wandb.init(**options["init"], settings=wandb.Settings(console="off", silent=True))
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    positions, well, open_ = dict(options["positions"]), False, True
    while open_:
        if select.select([sys.stdin], [], [], LOOK_EVERY_S)[0]:
            byte = sys.stdin.buffer.raw.read(1)
            well, open_ = well or byte == b"0", byte != b""
        for name in positions:
            found, positions[name] = rows_of(Path(options["directory"]) / name, positions[name])
            for row in found:
                run.log(numbers(name, row))
    run.finish(exit_code=0 if well else 1)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a request to stop goes to the run, which ends this
        signal.signal(number, signal.SIG_IGN)
    feed(json.loads(Path(sys.argv[1]).read_text()))
