"""Where metrics go: metrics.jsonl, eval.jsonl and samples.jsonl in the run directory, always, and wandb and
other loggers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from megatron_rl.config.resume import settings
from megatron_rl.config.schema import ObserveConfig
from megatron_rl.foreign import load_function
from megatron_rl.observe.feed import KNOWN
from megatron_rl.observe.files import write_json, write_whole
from megatron_rl.observe.jsonl import keep_rows
from megatron_rl.observe.versions import collect_versions

METRICS, EVALUATIONS, SAMPLES = "metrics.jsonl", "eval.jsonl", "samples.jsonl"
CONFIG, VERSIONS = "config.json", "versions.json"
LOGGER_CLOSE_S = 60.0

_LOG = logging.getLogger(__name__)


class MetricsLog:
    """The log of one run; only rank 0 opens it. Use as a context manager.

    Writes config.json and versions.json at the start, then one flushed line per `log` and `log_eval`.
    resume_step: continue a run whose last saved step this is; later lines are dropped, so that no step
    appears twice. Without it, a directory that holds metrics already is refused with a ValueError.
    """

    def __init__(
        self, directory: Path | str, config: ObserveConfig, config_dict: Mapping[str, Any], *,
        resume_step: int | None = None,
    ):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        metrics_path, eval_path, samples_path = (self.directory / name for name in (METRICS, EVALUATIONS, SAMPLES))
        if resume_step is not None:
            for path in (metrics_path, eval_path, samples_path):
                keep_rows(path, lambda row: row["step"] <= resume_step)
        elif metrics_path.exists() and metrics_path.stat().st_size > 0:
            raise ValueError(f"{metrics_path} holds the metrics of an earlier run: "
                             "continue it with run.resume=true, or choose another run.dir")
        if resume_step is not None:
            self._keep_config(config_dict, resume_step)
        write_json(self.directory / CONFIG, config_dict)
        write_json(self.directory / VERSIONS, collect_versions())
        self._metrics = metrics_path.open("a", encoding="utf-8")
        self._evaluations = eval_path.open("a", encoding="utf-8")
        self._feeds = _feeds(self.directory, config, config_dict)
        self._samples = samples_path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line {"step", "time" (seconds since the epoch), metrics...}. Names: docs/metrics.md."""
        self._append(self._metrics, {"step": step, "time": time.time(), **metrics})

    def log_eval(self, step: int, label: str, values: Mapping[str, Any]) -> None:
        """Appends one held-out evaluation to eval.jsonl. Labels and names: docs/metrics.md."""
        self._append(self._evaluations, {"step": step, "label": label, "time": time.time(), **values})

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends judged responses of a step to samples.jsonl (observe/samples.py)."""
        for sample in samples:
            self._append(self._samples, {"step": step, **sample})

    def _keep_config(self, now: Mapping[str, Any], step: int) -> None:
        """The settings of the steps up to `step`, beside the new ones if those differ; a start that left no step
        replaces none."""
        path, kept = self.directory / CONFIG, self.directory / f"config_until_step_{max(step, 0):08d}.json"
        if path.is_file() and not kept.exists():
            before = path.read_text(encoding="utf-8")
            if settings(json.loads(before)) != settings(dict(now)):
                write_whole(kept, before)

    def _append(self, file: Any, row: Mapping[str, Any]) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()

    def close(self, exit_code: int = 0) -> None:
        self._metrics.close()
        self._evaluations.close()
        self._samples.close()
        for feed in self._feeds:
            feed.close(exit_code)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)


def check_logger(path: str) -> None:
    """ValueError unless `path` is a name of observe/feed.py's KNOWN whose client is installed, or leads to a class."""
    if path in KNOWN:
        if importlib.util.find_spec(path) is None:
            raise ValueError(f"observe.loggers={path} needs the package {path}: pip install 'megatron_rl[{path}]'")
        return
    found = load_function("observe.loggers", path)
    if not isinstance(found, type) or not all(callable(getattr(found, name, None)) for name in ("log", "close")):
        raise ValueError(f"observe.loggers={path} is no logger: it must be a class with log(step, numbers) and "
                         "close(finished)")


def _feeds(directory: Path, config: ObserveConfig, config_dict: Mapping[str, Any]) -> list[LoggerFeed]:
    about = {path: (directory / "loggers" / path, {"logger": path, "sys_path": sys.path, "config": dict(config_dict)})
             for path in config.loggers}
    if config.wandb != "off":
        about["wandb"] = directory / "wandb", {"wandb": _wandb_init(directory, config, config_dict)}
    feeds = []
    for name, (folder, logger) in about.items():
        try:
            feeds.append(LoggerFeed(directory, name, folder, logger))
        except OSError as error:
            _LOG.warning("%s gets nothing: it could not be started (%s)", name, error)
    return feeds


def _wandb_init(directory: Path, config: ObserveConfig, config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of wandb.init. A resumed run keeps its id."""
    id_path = directory / "wandb_id.txt"
    if not id_path.exists():
        write_whole(id_path, uuid.uuid4().hex[:8] + "\n")
    return {"mode": config.wandb, "project": config.project, "name": directory.resolve().name, "dir": str(directory),
            "id": id_path.read_text(encoding="utf-8").strip(),
            "resume": "allow" if config.wandb == "online" else None, "config": dict(config_dict)}


class LoggerFeed:
    """Hands metrics.jsonl and eval.jsonl on to one logger through a process of its own (feed.py): whatever becomes of
    that, the run goes on. Its settings, its log and its temporary folders lie in `folder`."""

    def __init__(self, directory: Path, name: str, folder: Path, logger: Mapping[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        positions = {each: (directory / each).stat().st_size for each in (METRICS, EVALUATIONS)}
        write_json(folder / "feed.json", {"directory": str(directory), "positions": positions, **logger})
        self._name, self._log = name, folder / "feed.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("feed.py")), str(folder / "feed.json")],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder)})

    def close(self, exit_code: int) -> None:
        """Waits until the logger has everything, for LOGGER_CLOSE_S at most."""
        try:
            self._process.communicate(b"" if exit_code else b"0", timeout=LOGGER_CLOSE_S)
        except subprocess.TimeoutExpired:
            family = psutil.Process(self._process.pid).children(recursive=True)  # wandb's service, which may hang
            self._process.kill()
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            self._process.communicate()
        if self._process.returncode:
            _LOG.warning("%s did not get everything (exit code %d); metrics.jsonl has it. See %s",
                         self._name, self._process.returncode, self._log)
