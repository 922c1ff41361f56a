"""Metrics of one or several runs as drawings: what page.js needs to draw lines against steps, time or tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_rl.observe.panels import PHASES, Plot

__all__ = ["Drawing", "Key", "Line", "Rows", "axes_of", "css", "draw", "draw_accuracy", "draw_times", "is_number",
           "run_keys", "series_of", "smoothing_window"]

DASHES = ("solid", "dashed", "dotted", "double")
"""The dash of a line in a comparison, by its place among the metrics of a plot (page.js, and the legend's border)."""
FIRST, AREAS = ("correct", "wrong"), (2, 1, 0, 3, 4, 5, 6, 7)
"""The lowest of the stacked areas, and the colours in that order: what is right is green."""
SMOOTH_FROM_STEPS = 40
COLOURS = 8  # page.css: --series-0 to --series-7

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Key:
    """One legend entry: a colour (CSS) and a border style (CSS) for the line it stands for."""

    label: str
    color: str
    style: str = "solid"


@dataclass(frozen=True)
class Line:
    """One line: steps and values [n], and their intervals if low and high [n] are given.

    run: its place among the runs of the page, whose time and tokens its steps stand for. constant: drawn thin and
    dotted, without a number under the pointer.
    """

    label: str
    color: str
    steps: np.ndarray
    values: np.ndarray
    run: int = 0
    style: str = "solid"
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    constant: bool = False


@dataclass(frozen=True)
class Drawing:
    """A plot before it is drawn. smooth: long lines get a running mean. stacked: areas on top of each other.

    band: (low, high) of the y axis, shaded. ring: (x, y) of a point with a ring. x: what the steps are, if not steps.
    """

    unit: str
    lines: Sequence[Line]
    legend: Sequence[Key] = ()
    from_zero: bool = False
    smooth: bool = False
    stacked: bool = False
    log: bool = False
    band: tuple[float, float] | None = None
    ring: tuple[float, float] | None = None
    x: str = field(default="step")


def smoothing_window(num_steps: int) -> int:
    """Odd number of steps in a running mean: a tenth of the run; 1, that is none, for a short one."""
    return num_steps // 10 // 2 * 2 + 1 if num_steps >= SMOOTH_FROM_STEPS else 1


def css(index: int) -> str:
    """The colour of a series, as the page names it."""
    return f"var(--series-{index % COLOURS})"


def series_of(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have a finite number under `key`, float64 [n]."""
    pairs = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    return np.array([step for step, _ in pairs], dtype=float), np.array([value for _, value in pairs], dtype=float)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def run_keys(names: Sequence[str]) -> tuple[Key, ...]:
    """The legend shared by all plots of a comparison: a colour is a run."""
    return tuple(Key(name, css(index)) for index, name in enumerate(names))


def axes_of(rows: Rows, evaluations: Rows) -> dict[str, list[float]]:
    """What a step of a run stands for: seconds since the run's first line, and tokens trained on until then.

    Lists of equal length, the first entry that of step 0. A list is empty if a row lacks its metric.
    """
    times = [row["time"] for row in (*rows, *evaluations) if is_number(row.get("time"))]
    begun = min(times, default=0.0)
    has_time, has_tokens = (all(is_number(row.get(key)) for row in rows) for key in ("time", "budget/selected_tokens"))
    tokens = np.cumsum([row["budget/selected_tokens"] for row in rows]).tolist() if has_tokens else []
    return {"step": [0, *(row["step"] for row in rows)],
            "time": [0.0, *(round(row["time"] - begun, 2) for row in rows)] if has_time else [],
            "tokens": [0, *tokens] if has_tokens else []}


def draw(plot: Plot, runs: Mapping[str, Rows]) -> Drawing | None:
    """The plot, or None when no run has any of its metrics. Several runs: a colour is a run, a dash a metric."""
    if plot.prefix:
        return _draw_family(plot, *runs.values()) if len(runs) == 1 else None
    lines, legend = [], {}
    for run_index, (run, rows) in enumerate(runs.items()):
        for index, (key, label) in enumerate(plot.series.items()):
            steps, values = series_of(rows, key)
            if not len(steps):
                continue
            if len(runs) == 1:
                color, style, name = css(index), "solid", label
                legend[index] = Key(label, color)
            else:
                color, style = css(run_index), DASHES[index % len(DASHES)]
                name = run if len(plot.series) == 1 else f"{run}, {label}"
                legend[index] = Key(label, "var(--ink)", style)
            lines.append(Line(name, color, steps, values, run_index, style))
    if not lines:
        return None
    keys = [legend[index] for index in sorted(legend)]
    for key, label in plot.constants.items():
        drawn = [(index, *series_of(rows, key)) for index, rows in enumerate(runs.values())]
        drawn = [Line(label, "var(--ink)", steps, values, index, "dotted", constant=True)
                 for index, steps, values in drawn if len(steps)]
        lines += drawn
        keys += [Key(label, "var(--ink)", "dotted")] if drawn else []
    return Drawing(plot.unit, lines, keys if len(keys) > 1 else (), plot.from_zero, plot.smooth, log=plot.log)


def _draw_family(plot: Plot, rows: Rows) -> Drawing | None:
    """A line, or with plot.stacked an area, per metric `<prefix><name>` that occurs."""
    found = {name for row in rows for name in row if name.startswith(plot.prefix)}
    lines = []
    names = sorted(found, key=lambda name: (*(not name.endswith(f"/{first}") for first in FIRST), len(name), name))
    for index, name in enumerate(names):
        label = plot.label.format(name.removeprefix(plot.prefix).replace("_", " "))
        if plot.stacked:  # a status that no response of a step had is not logged in it
            values = np.array([row[name] if is_number(row.get(name)) else 0.0 for row in rows])
            color = css(AREAS[index % len(AREAS)])
            lines.append(Line(label, color, np.array([row["step"] for row in rows], dtype=float), values))
            continue
        strength = 0.25 + 0.75 * index / max(len(names) - 1, 1)
        steps, values = series_of(rows, name)
        if len(steps):
            lines.append(Line(label, f"color-mix(in srgb, {css(0)} {strength:.0%}, transparent)", steps, values))
    if not lines:
        return None
    keys = lines if plot.stacked else [lines[0], lines[-1]] if len(lines) > 1 else []
    return Drawing(plot.unit, lines, [Key(line.label, line.color) for line in keys], plot.from_zero,
                   plot.smooth and not plot.stacked, plot.stacked)


def draw_accuracy(evaluations: Mapping[str, Rows], key: str) -> Drawing | None:
    """`key` (accuracy or mean_reward) of the held-out evaluations with its interval, one colour per run.

    The evaluation before SFT belongs to another model than the one with which the run begins: it is not drawn.
    """
    prefix, lines = "" if key == "accuracy" else f"{key}_", []
    for index, (run, rows) in enumerate(evaluations.items()):
        latest = {row["step"]: row for row in rows if is_number(row.get(key)) and row.get("label") != "before_sft"}
        if not latest:
            continue
        steps = sorted(latest)
        values, low, high = (np.array([latest[step].get(name, latest[step][key]) for step in steps], dtype=float)
                             for name in (key, f"{prefix}low", f"{prefix}high"))
        label = run if len(evaluations) > 1 else key.replace("_", " ")
        lines.append(Line(label, css(index), np.array(steps, dtype=float), values, index, low=low, high=high))
    return Drawing(f"held-out {key.replace('_', ' ')}", lines, from_zero=True) if lines else None


def draw_times(rows: Rows, run: int) -> Drawing | None:
    """Seconds per phase of one run, stacked over the steps; None when no phase was timed."""
    timed = [row for row in rows if any(is_number(row.get(f"time/{phase}")) for phase in PHASES)]
    present = [phase for phase in PHASES if any(is_number(row.get(f"time/{phase}")) for row in timed)]
    steps = np.array([row["step"] for row in timed], dtype=float)
    lines = [Line(phase, css(index), steps, np.array(
        [row[f"time/{phase}"] if is_number(row.get(f"time/{phase}")) else 0.0 for row in timed]), run)
        for index, phase in enumerate(present)]
    return Drawing("seconds", lines, [Key(line.label, line.color) for line in lines], from_zero=True,
                   stacked=True) if lines else None
