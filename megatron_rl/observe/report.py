"""One HTML file that shows what a run did, or how several runs compare, from the files in their directories.

It reads what sinks.py writes: metrics.jsonl (required), eval.jsonl, samples.jsonl, config.json and versions.json.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.observe import page, plots
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.panels import GROUPS, Plot
from megatron_rl.observe.progress import duration
from megatron_rl.observe.sinks import CONFIG, EVALUATIONS, METRICS, SAMPLES, VERSIONS

LABELS = {"before_sft": "before SFT", "after_sft": "after SFT", "before_rl": "before RL", "after_rl": "after RL"}
EVALUATION_COLUMNS = (
    ("accuracy", "accuracy", "{:.3f}"),
    ("mean_reward", "mean reward", "{:.3f}"),
    ("mean_response_tokens", "response tokens", "{:.1f}"),
    ("truncated_fraction", "truncated", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
)
"""What the table of results shows, besides the numbers of observe.metrics."""
NOT_SHOWN = re.compile(r".*[/@].*|.*_(low|high)|low|high|step|time|seconds|problems|samples_per_problem")
MOST_SAMPLES = 300


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds; names are unique within a report."""

    name: str
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, Any]


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes the report of one or several runs to `out` (an .html file) and returns it.

    ValueError names the file when a run has no metrics, or when a line is not JSON. A metric that a run does
    not have leaves its plot out.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run directory")
    runs = _load_runs([Path(directory) for directory in run_dirs])
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = [f"<h1>{page.text(title)}</h1>", _subtitle(runs), _summary(runs), *map(_nonfinite_note, runs),
            _closing_table(runs), _differences(runs), _plots(runs), _samples(runs), _configs(runs), _versions(runs)]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.page(f"{title} - megatron_rl", [part for part in body if part]), encoding="utf-8")
    return out


def _load_runs(directories: Sequence[Path]) -> list[RunRecord]:
    return [_load(directory, name) for directory, name in zip(directories, _names(directories), strict=True)]


def _names(directories: Sequence[Path]) -> list[str]:
    """Each directory by as many of its last parts as tell them apart, and no fewer than two."""
    parts = [directory.resolve().parts for directory in directories]
    longest = max(map(len, parts))
    for number in range(2, longest + 1):
        names = ["/".join(each[-number:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _load(directory: Path, name: str) -> RunRecord:
    metrics = directory / METRICS
    if not metrics.is_file():
        raise ValueError(f"{metrics} does not exist: {directory} is not the directory of a run that logged a step")
    rows = read_jsonl(metrics)
    if not rows:
        raise ValueError(f"{metrics} holds no step")
    path = directory / EVALUATIONS
    evaluations, samples = (read_jsonl(each) if each.is_file() else [] for each in (path, directory / SAMPLES))
    _check_steps(metrics, rows)
    _check_steps(path, evaluations)
    _check_steps(directory / SAMPLES, samples)
    return RunRecord(name, sorted(rows, key=lambda row: row["step"]), evaluations, samples,
                     _read_object(directory / CONFIG), _read_object(directory / VERSIONS))


def _check_steps(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    for number, row in enumerate(rows, 1):
        if not plots.is_number(row.get("step")):
            raise ValueError(f'{path}:{number}: no number under "step"')


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _subtitle(runs: Sequence[RunRecord]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    names = "" if len(runs) == 1 else f" of {', '.join(run.name for run in runs)}"
    return f'<p class="quiet">megatron_rl report{page.text(names)}, written {written}</p>'


def _summary(runs: Sequence[RunRecord]) -> str:
    """How far each run got and what it reached: a row of figures, or a table of them for several runs."""
    note = ('<p class="quiet">Reward, pass rate, fill, trainer against engine, seconds and tokens/s are means over the '
            "last tenth of a run.</p>")
    facts = [_facts(run) for run in runs]
    if len(runs) == 1:
        return page.tiles((value, label) for label, value in facts[0].items()) + note
    labels = list(dict.fromkeys(label for run_facts in facts for label in run_facts))
    rows = [[run.name, *(run_facts.get(label, "-") for label in labels)]
            for run, run_facts in zip(runs, facts, strict=True)]
    return page.table(["run", *labels], rows, numbers_from=1) + note


def _facts(run: RunRecord) -> dict[str, str]:
    facts = {"steps": f"{int(run.rows[-1]['step']):,}"}
    times = [row["time"] for row in run.rows + run.evaluations if plots.is_number(row.get("time"))]
    if len(times) > 1:
        facts["logged over"] = duration(max(times) - min(times))
    for key in ("accuracy", "mean_reward"):  # of this run's own models: before SFT there was another
        measured = [row[key] for row in run.evaluations
                    if plots.is_number(row.get(key)) and row.get("label") != "before_sft"]
        if len(measured) > 1:
            first, last = measured[0], measured[-1]
            facts[f"held-out {key.replace('_', ' ')}, first and last"] = f"{first:.3f} \u2192 {last:.3f}"
            break
    generated, dropped = (sum(plots.series_of(run.rows, key)[1].sum() for key in keys) for keys in (
        ["rollout/generated_tokens"], ["budget/dropped_tokens", "rollout/dropped_tokens"]))
    if generated:
        facts["of sampled tokens dropped"] = f"{dropped / generated:.1%}"
    for key, label, pattern in (("reward/mean", "mean reward", "{:.3f}"), ("reward/pass_rate", "pass rate", "{:.3f}"),
                                ("budget/fill", "budget fill", "{:.3f}"),
                                ("mismatch/mean_abs", "trainer against engine, nats", "{:.2g}"),
                                ("train/trained_share", "of the parameters train", "{:.2%}"),
                                ("time/step", "seconds a step", "{:.2f}"),
                                ("tokens_per_s/train", "trained tokens/s", "{:,.0f}")):
        _, values = plots.series_of(run.rows, key)
        if len(values):
            facts[label] = pattern.format(np.mean(values[-max(1, len(values) // 10):]))
    return facts


def _nonfinite_note(run: RunRecord) -> str:
    """Plots leave NaN and infinity out; a reader must learn that they were there."""
    places: dict[str, list[int]] = {}
    for row in run.rows:
        for key, value in row.items():
            if isinstance(value, float) and not np.isfinite(value):
                places.setdefault(key, []).append(row["step"])
    if not places:
        return ""
    listed = "; ".join(f"{key} at step {steps[0]}" + (f" and {len(steps) - 1} more" if len(steps) > 1 else "")
                       for key, steps in places.items())
    return f"<p><b>Not finite, and left out of the plots</b> ({page.text(run.name)}): {page.text(listed)}</p>"


def _plots(runs: Sequence[RunRecord]) -> str:
    """Every group of plots that has any; the first begins with the held-out accuracy, the last ends with times."""
    rows = {run.name: run.rows for run in runs}
    evaluations = {run.name: run.evaluations for run in runs}
    own = sorted({key for run in runs for row in run.rows for key in row if key.startswith("extra/")})
    panels = {**GROUPS, "Your own metrics": tuple(
        Plot(key.removeprefix("extra/").replace("_", " "), "", {key: key.removeprefix("extra/")}) for key in own)}
    groups: dict[str, list[str]] = {heading: [] for heading in panels}
    first, last = groups[next(iter(GROUPS))], groups[next(reversed(GROUPS))]
    for key in ("accuracy", "mean_reward"):
        drawing = plots.draw_accuracy(evaluations, key)
        if drawing:
            first.append(page.figure(f"Held-out {key.replace('_', ' ')}", drawing,
                                     "Bars: 95% bootstrap interval over problems."))
            break
    for heading, members in panels.items():
        for plot in members:
            drawing = plots.draw(plot, rows)
            if drawing:
                groups[heading].append(page.figure(plot.title, drawing, plot.note))
    for index, run in enumerate(runs):
        drawing = plots.draw_times(run.rows, index)
        if drawing:
            last.append(page.figure("Time per phase" if len(runs) == 1 else f"Time per phase: {run.name}", drawing))
    parts = []
    window = plots.smoothing_window(max(len(run.rows) for run in runs))
    if window > 1:
        parts.append('<p class="quiet">Faint lines are single steps; strong lines are a centred mean over '
                     f"{window} steps.</p>")
    if len(runs) > 1:
        parts.append(f'<div class="keys">{page.legend(plots.run_keys([run.name for run in runs]))}</div>')
    parts += [f'<h3>{page.text(heading)}</h3><div class="plots">{"".join(figures)}</div>'
              for heading, figures in groups.items() if figures]
    axes = [plots.axes_of(run.rows, run.evaluations) for run in runs]
    return "<h2>Step by step</h2>" + page.steps(axes, "".join(parts))


def _samples(runs: Sequence[RunRecord]) -> str:
    """Sampled responses, the last steps first; of a long run evenly spread ones, so that the page stays small."""
    parts = []
    for run in runs:
        if not run.samples:
            continue
        count = min(MOST_SAMPLES, len(run.samples))
        places = np.linspace(0, len(run.samples) - 1, count).round().astype(int)
        of_run = "" if len(runs) == 1 else f": {page.text(run.name)}"
        some = "" if len(places) == len(run.samples) else (
            f'<p class="quiet">{len(places)} of the {len(run.samples):,} in samples.jsonl.</p>')
        parts.append(f"<h2>Prompts and responses{of_run}</h2>{some}"
                     + page.samples([run.samples[place] for place in reversed(places)]))
    return "".join(parts)


def _closing_table(runs: Sequence[RunRecord]) -> str:
    """The stages of each run, or its first and last evaluation where no stage is labelled."""
    lines = []
    for run in runs:
        stages = {row.get("label"): row for row in run.evaluations if row.get("label") in LABELS}
        if not stages and run.evaluations:
            stages = {f"step {row['step']}": row for row in (run.evaluations[0], run.evaluations[-1])}
        for label in sorted(stages, key=_stage_order):
            lines.append((run, LABELS.get(label, label), stages[label]))
    if not lines:
        return ""
    known = [key for key, _, _ in EVALUATION_COLUMNS]
    own = dict.fromkeys(key for _, _, row in lines for key, value in row.items()
                        if plots.is_number(value) and key not in known and not NOT_SHOWN.fullmatch(key))
    columns = [column for column in (*EVALUATION_COLUMNS, *((key, key.replace("_", " "), "{:.3f}") for key in own))
               if any(plots.is_number(row.get(column[0])) for _, _, row in lines)]
    header = [*(["run"] if len(runs) > 1 else []), "stage", *(title for _, title, _ in columns)]
    cells = [[*([run.name] if len(runs) > 1 else []), label, *(_evaluation_cell(row, *column) for column in columns)]
             for run, label, row in lines]
    return "<h2>Result</h2>" + page.table(header, cells, numbers_from=len(header) - len(columns))


def _stage_order(label: str) -> int:
    return list(LABELS).index(label) if label in LABELS else int(label.removeprefix("step "))


def _evaluation_cell(row: Mapping[str, Any], key: str, title: str, pattern: str) -> str:
    if not plots.is_number(row.get(key)):
        return "-"
    shown = pattern.format(row[key])
    if key == "accuracy" and plots.is_number(row.get("low")) and plots.is_number(row.get("high")):
        shown += f" [{row['low']:.3f}, {row['high']:.3f}]"
    return shown


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with JSON values: {"algo.phi": "4096", ...}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat


def _differences(runs: Sequence[RunRecord]) -> str:
    if len(runs) < 2:
        return ""
    flat = [flatten(run.config) for run in runs]
    keys = sorted({key for config in flat for key in config})
    rows = [[key, *(config.get(key, "not set") for config in flat)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return "<h2>Configuration differences</h2><p>None.</p>"
    return "<h2>Configuration differences</h2>" + page.table(["key", *(run.name for run in runs)], differing)


def _configs(runs: Sequence[RunRecord]) -> str:
    parts = [f"<details><summary>{page.text(run.name)}</summary><pre>"
             f"{page.text(json.dumps(run.config, indent=2))}</pre></details>" for run in runs if run.config]
    return "<h2>Configuration</h2>" + "".join(parts) if parts else ""


def _versions(runs: Sequence[RunRecord]) -> str:
    """Versions and machine, one column per run, or one column in all when the runs agree."""
    if not any(run.versions for run in runs):
        return ""
    flat = [{key: value.strip('"') for key, value in flatten(run.versions).items()} for run in runs]
    header = ["", *(run.name for run in runs)]
    if all(versions == flat[0] for versions in flat):
        flat, header = flat[:1], ["", "every run" if len(runs) > 1 else runs[0].name]
    keys = list(dict.fromkeys(key for versions in flat for key in versions))
    rows = [[key.replace(".", ": ", 1), *(versions.get(key, "-") for versions in flat)] for key in keys]
    shown = [[key, *("none" if value in ("null", "[]") else value for value in values)] for key, *values in rows]
    return "<h2>Versions and machine</h2>" + page.table(header, shown)


def run_sections(directory: Path) -> str:
    """What the report of one run shows between title and configuration, for a page about more than that run."""
    runs = [_load(directory, directory.name)]
    return "".join([_summary(runs), _nonfinite_note(runs[0]), _closing_table(runs), _plots(runs)])


def versions_section(directories: Sequence[Path]) -> str:
    return _versions(_load_runs(directories)) if directories else ""
