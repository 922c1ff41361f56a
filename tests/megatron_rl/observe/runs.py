"""Run directories for the tests of the report."""

import json
from pathlib import Path

from megatron_rl.observe.panels import GROUPS, PHASES

PLOTS = [plot for plots in GROUPS.values() for plot in plots]


def make_run(directory: Path, steps: int = 12, objective: str = "c3po", **changes: object) -> Path:
    """A run directory with every metric that the report plots."""
    directory.mkdir(parents=True)
    keys = [key for plot in PLOTS for key in (*plot.series, *plot.constants)]
    keys += [f"time/{phase}" for phase in PHASES] + [f"router/load_max_over_mean/layer_{layer}" for layer in range(12)]
    rows = [{"step": step, "time": 1000.0 + step, **dict.fromkeys(keys, 0.1 + step / 100), **changes}
            for step in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [(0, "before_sft", 0.01), (0, "after_sft", 0.4), (6, "during", 0.5), (steps, "after_rl", 0.676)]
    (directory / "eval.jsonl").write_text("".join(
        json.dumps({"step": step, "label": label, "accuracy": value, "low": value - 0.01, "high": value + 0.02}) + "\n"
        for step, label, value in stages))
    (directory / "config.json").write_text(json.dumps({"c3po": {"objective": objective, "phi": 4096}}))
    (directory / "versions.json").write_text(json.dumps({"python": "3.12.1", "git": None}))
    return directory
