"""Gives the rows of a run's files to a logger (wandb, TensorBoard, MLflow, SwanLab, or one of the user's own).

It is a process of its own, so that nothing that happens to the logger (it is killed, hangs, raises, or its service
refuses) reaches the run. sinks.py starts it:

    python -P feed.py SETTINGS.json    settings of the run, and the file positions to begin at

It ends when its standard input does: after a byte `0` the run was well, otherwise it failed. It imports nothing of
ours, because torch would come with it, and a logger's client only where that logger is asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
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


class TensorBoard:
    """Event files under <run.dir>/tensorboard, one for each start of the run.

    A resumed run takes back what its last start wrote of later steps: TensorBoard drops them where it reads START.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any]):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))
        settings = json.loads((run_dir / "loggers" / "tensorboard" / "feed.json").read_text())
        kept = (run_dir / "metrics.jsonl").read_bytes()[:settings["positions"]["metrics.jsonl"]].splitlines()
        self._add(json.loads(kept[-1])["step"] + 1 if kept else 0, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._add(step, summary=self._summary(value=values))

    def close(self, finished: bool) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(step=step, wall_time=time.time(), **content))
        self._writer.flush()


class MLflow:
    """One run of the experiment observe.project, at the server or store that MLFLOW_TRACKING_URI names.

    The run's id lies in <run.dir>/loggers/mlflow, so that a resumed run goes on there. MLflow takes few characters in
    a name: eval/pass@4 is called eval/pass_4.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric, name = MlflowClient(), Metric, config["observe"]["project"]
        id_path = run_dir / "loggers" / "mlflow" / "run_id.txt"
        if id_path.exists():
            self._id = id_path.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(where, run_name=run_dir.resolve().name).info.run_id
        id_path.write_text(self._id + "\n")
        settings = [Param(self._named(key), str(value)) for key, value in leaves(config)]
        for begin in range(0, len(settings), 100):  # the most that a request may hold
            self._client.log_batch(self._id, params=settings[begin:begin + 100])

    def log(self, step: int, numbers: dict[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[
            self._metric(self._named(name), value, now, step) for name, value in numbers.items()])

    @staticmethod
    def _named(name: str) -> str:
        return re.sub(r"[^\w./ -]", "_", name)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if finished else "FAILED")


class SwanLab:
    """One run of the project observe.project. SWANLAB_MODE says where to (online, local, offline), offline by default.

    Its files lie in <run.dir>/swanlab. With SWANLAB_MODE=online a resumed run goes on in its run.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any]):
        import swanlab

        mode, id_path = os.environ.get("SWANLAB_MODE", "offline"), run_dir / "loggers" / "swanlab" / "run_id.txt"
        if not id_path.exists():
            id_path.write_text(uuid.uuid4().hex[:8] + "\n")
        online = {"id": id_path.read_text().strip(), "resume": "allow"} if mode == "online" else {}
        folder = run_dir / "swanlab"
        folder.mkdir(exist_ok=True)
        self._run = swanlab.init(mode=mode, project=config["observe"]["project"], name=run_dir.resolve().name,
                                 log_dir=str(folder), config=config, **online)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(state="success" if finished else "crashed")


KNOWN: dict[str, Callable[[Path, dict[str, Any]], Logger]] = {
    "tensorboard": TensorBoard, "mlflow": MLflow, "swanlab": SwanLab}
"""Names that observe.loggers takes; each is also the module that the logger imports, and the extra that brings it."""


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a configuration."""
    if not isinstance(tree, dict) or not tree:
        yield path, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{path}.{key}" if path else key)


def logger_of(options: dict) -> Logger:
    if "wandb" in options:
        return Wandb(options["wandb"])
    sys.path[:] = options["sys_path"]
    if options["logger"] in KNOWN:
        return KNOWN[options["logger"]](Path(options["directory"]), options["config"])
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
