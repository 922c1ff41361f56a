"""Run directories for the tests of the report."""

import json
from pathlib import Path

from megatron_rl.observe.panels import GROUPS, PHASES

PLOTS = [plot for plots in GROUPS.values() for plot in plots]
FAMILIES = {"reward/status/": ("correct", "wrong", "no_answer"),
            "router/load_max_over_mean/layer_": tuple(map(str, range(12)))}
SAMPLES = [("3+4", "so 3+4=7 so \\boxed{7}", "correct", 1.0),
           ("<b>9-2</b> & more", "so\n9-2=6 so \\boxed{6}", "wrong", 0.0),
           ("1+1", "hmm " * 100, "no_answer", 0.0)]


def make_run(directory: Path, steps: int = 12, objective: str = "c3po", **changes: object) -> Path:
    """A run directory with every metric that the report plots."""
    directory.mkdir(parents=True)
    keys = [key for plot in PLOTS for key in (*plot.series, *plot.constants)]
    keys += [f"time/{phase}" for phase in PHASES] + [prefix + name for prefix in FAMILIES for name in FAMILIES[prefix]]
    rows = [{"step": step, "time": 1000.0 + 30 * step, **dict.fromkeys(keys, 0.1 + step / 100),
             "budget/selected_tokens": 500, **changes} for step in range(1, steps + 1)]
    _write(directory / "metrics.jsonl", rows)
    stages = [(0, "before_sft", 0.01), (0, "after_sft", 0.4), (6, "during", 0.5), (steps, "after_rl", 0.676)]
    _write(directory / "eval.jsonl", [
        {"step": step, "label": label, "time": 1000.0 + 30 * step, "accuracy": value, "low": value - 0.01,
         "high": value + 0.02, "direct_share": 0.25} for step, label, value in stages])
    _write(directory / "samples.jsonl", [
        {"step": step, "id": str(place), "sample": 0, "prompt": prompt, "response": response, "answer": "7",
         "reward": reward, "correct": status == "correct", "status": status, "detail": "", "response_tokens": 9,
         "finish": "stop"} for step in range(1, steps + 1) for place, (prompt, response, status, reward)
        in enumerate(SAMPLES)])
    (directory / "config.json").write_text(json.dumps({"algo": {"objective": objective, "phi": 4096}}))
    (directory / "versions.json").write_text(json.dumps({"python": "3.12.1", "git": None}))
    return directory


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
