"""Where metrics go: metrics.jsonl, eval.jsonl and samples.jsonl in the run directory, always, and wandb."""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rl.config.schema import ObserveConfig
from megatron_rl.observe.files import write_json, write_whole
from megatron_rl.observe.jsonl import keep_rows
from megatron_rl.observe.versions import collect_versions

METRICS, EVALUATIONS, SAMPLES = "metrics.jsonl", "eval.jsonl", "samples.jsonl"
CONFIG, VERSIONS = "config.json", "versions.json"


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
        write_json(self.directory / CONFIG, config_dict)
        write_json(self.directory / VERSIONS, collect_versions())
        self._wandb = None if config.wandb == "off" else _start_wandb(self.directory, config, config_dict)
        self._metrics = metrics_path.open("a", encoding="utf-8")
        self._evaluations = eval_path.open("a", encoding="utf-8")
        self._samples = samples_path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line {"step", "time" (seconds since the epoch), metrics...}. Names: docs/metrics.md."""
        self._append(self._metrics, {"step": step, "time": time.time(), **metrics})
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})

    def log_eval(self, step: int, label: str, values: Mapping[str, Any]) -> None:
        """Appends one held-out evaluation to eval.jsonl. Labels and names: docs/metrics.md."""
        self._append(self._evaluations, {"step": step, "label": label, "time": time.time(), **values})
        if self._wandb is not None:
            numbers = {f"eval/{name}": value for name, value in values.items() if isinstance(value, int | float)}
            self._wandb.log({"step": step, **numbers})

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends judged responses of a step to samples.jsonl (observe/samples.py)."""
        for sample in samples:
            self._append(self._samples, {"step": step, **sample})

    def _append(self, file: Any, row: Mapping[str, Any]) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()

    def close(self, exit_code: int = 0) -> None:
        self._metrics.close()
        self._evaluations.close()
        self._samples.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)


def _start_wandb(directory: Path, config: ObserveConfig, config_dict: Mapping[str, Any]) -> Any:
    """A wandb run under directory/wandb whose x axis is `step`; a resumed run keeps its id.

    wandb's temporary folders lie there too: it makes them when it is imported, and a run that is killed leaves them.
    """
    before, tempfile.tempdir = tempfile.tempdir, str(directory / "wandb")
    try:
        (directory / "wandb").mkdir(exist_ok=True)
        import wandb  # only here: it takes a second and starts a process
    finally:
        tempfile.tempdir = before
    id_path = directory / "wandb_id.txt"
    if not id_path.exists():
        write_whole(id_path, uuid.uuid4().hex[:8] + "\n")
    run = wandb.init(
        mode=config.wandb, project=config.project, name=directory.resolve().name, dir=str(directory),
        id=id_path.read_text(encoding="utf-8").strip(), resume="allow" if config.wandb == "online" else None,
        config=dict(config_dict), settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
