"""Metrics of one or several runs as drawings: lines over steps, accuracy with its interval, time per phase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_rl.observe.canvas import INK, SERIES, Canvas, Drawing, Key, Line, css
from megatron_rl.observe.panels import PHASES, Plot

# The dash of a line by its place among the metrics of a plot, for matplotlib and for the legend's CSS border.
DASHES = (("-", "solid"), ("--", "dashed"), (":", "dotted"), ("-.", "double"))

Rows = Sequence[Mapping[str, Any]]


def series_of(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have a finite number under `key`, float64 [n]."""
    pairs = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    return np.array([step for step, _ in pairs], dtype=float), np.array([value for _, value in pairs], dtype=float)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def run_keys(names: Sequence[str]) -> tuple[Key, ...]:
    """The legend shared by all plots of a comparison: a colour is a run."""
    return tuple(Key(name, css(index)) for index, name in enumerate(names))


def draw(plot: Plot, runs: Mapping[str, Rows]) -> Drawing | None:
    """The plot, or None when no run has any of its metrics. Several runs: a colour is a run, a dash a metric."""
    if plot.per_layer:
        return _draw_layers(plot, *runs.values()) if len(runs) == 1 else None
    canvas, lines, legend = Canvas(plot.unit), [], {}
    for run_index, (run, rows) in enumerate(runs.items()):
        for index, (key, label) in enumerate(plot.series.items()):
            steps, values = series_of(rows, key)
            if not len(steps):
                continue
            if len(runs) == 1:
                color, dash, name = index, "-", label
                legend[index] = Key(label, css(index))
            else:
                color, (dash, style) = run_index, DASHES[index % len(DASHES)]
                name = run if len(plot.series) == 1 else f"{run}, {label}"
                legend[index] = Key(label, "var(--ink)", style)
            canvas.line(steps, values, SERIES[color % len(SERIES)], dash, smooth=plot.smooth)
            lines.append(Line(name, css(color), steps, values))
    if not lines:
        return None
    keys = [legend[index] for index in sorted(legend)]
    for key, label in plot.constants.items():
        drawn = [constant for constant in (series_of(rows, key) for rows in runs.values()) if len(constant[0])]
        for steps, values in drawn:
            canvas.axes.plot(steps, values, color=INK, linestyle=(0, (1.5, 2)), linewidth=1.0)
        keys += [Key(label, "var(--ink)", "dotted")] if drawn else []
    return canvas.finish(plot.title, keys if len(keys) > 1 else (), lines, from_zero=plot.from_zero)


def _draw_layers(plot: Plot, rows: Rows) -> Drawing | None:
    """A line per metric `<per_layer><number>` that occurs."""
    found = {name for row in rows for name in row if name.startswith(plot.per_layer)}
    canvas, lines, legend = Canvas(plot.unit), [], []
    names = sorted(found, key=lambda name: (len(name), name))
    for index, name in enumerate(names):
        steps, values = series_of(rows, name)
        if not len(steps):
            continue
        strength = 0.25 + 0.75 * index / max(len(names) - 1, 1)
        canvas.line(steps, values, SERIES[0], alpha=strength)
        label = f"layer {name.removeprefix(plot.per_layer)}"
        color = f"color-mix(in srgb, {css(0)} {strength:.0%}, transparent)"
        lines.append(Line(label, color, steps, values))
        if index in (0, len(names) - 1):
            legend.append(Key(label, color))
    return canvas.finish(plot.title, legend, lines) if lines else None


def draw_accuracy(evaluations: Mapping[str, Rows]) -> Drawing | None:
    """Held-out accuracy with its interval against the step, one colour per run; None without evaluations.

    Of two evaluations at one step (before and after SFT) the later one is drawn.
    """
    canvas, lines = Canvas("held-out accuracy"), []
    for index, (run, rows) in enumerate(evaluations.items()):
        latest = {row["step"]: row for row in rows if is_number(row.get("accuracy"))}
        if not latest:
            continue
        steps = np.array(sorted(latest), dtype=float)
        accuracy, low, high = (np.array([latest[step].get(key, latest[step]["accuracy"]) for step in sorted(latest)])
                               for key in ("accuracy", "low", "high"))
        canvas.axes.errorbar(steps, accuracy, yerr=[accuracy - low, high - accuracy],
                             color=SERIES[index % len(SERIES)], marker="o", markersize=3.5, capsize=2.5,
                             linewidth=1.4, elinewidth=0.9)
        lines.append(Line(run if len(evaluations) > 1 else "accuracy", css(index), steps, accuracy))
    return canvas.finish("Held-out accuracy", (), lines, from_zero=True) if lines else None


def draw_times(rows: Rows, title: str) -> Drawing | None:
    """Seconds per phase of one run, stacked over the steps; None when no phase was timed."""
    timed = [row for row in rows if any(is_number(row.get(f"time/{phase}")) for phase in PHASES)]
    if not timed:
        return None
    canvas, lines = Canvas("seconds"), []
    steps = np.array([row["step"] for row in timed], dtype=float)
    present = [phase for phase in PHASES if any(is_number(row.get(f"time/{phase}")) for row in timed)]
    width = float(np.diff(steps).min()) if len(steps) > 1 else 1.0
    edges = np.append(steps - width / 2, steps[-1] + width / 2)
    base = np.zeros(len(edges))
    for index, phase in enumerate(present):
        seconds = np.array([row[f"time/{phase}"] if is_number(row.get(f"time/{phase}")) else 0.0 for row in timed])
        top = base + np.append(seconds, seconds[-1])
        canvas.axes.fill_between(edges, base, top, step="post", color=SERIES[index % len(SERIES)], linewidth=0)
        lines.append(Line(phase, css(index), steps, seconds))
        base = top
    canvas.axes.set_ylim(0.0, 1.04 * base.max())
    return canvas.finish(title, [Key(line.label, line.color) for line in lines], lines, from_zero=True)
