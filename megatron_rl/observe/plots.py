"""The plots of a report, as inline SVG that takes its colours from the page (light and dark)."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Stand-ins that to_svg replaces by CSS variables; matplotlib writes colours as lower-case hex.
INK = "#0a0b0c"
SERIES = tuple(f"#f0000{index}" for index in range(8))
# The dash of a line by its place among the metrics of a plot, for matplotlib and for the legend's CSS border.
DASHES = (("-", "solid"), ("--", "dashed"), (":", "dotted"), ("-.", "double"))
SMOOTH_FROM_STEPS = 40
# Small on purpose: shown 340 to 400 CSS pixels wide, the labels are then 10 to 12 pixels.
SIZE_IN = (4.0, 2.45)
RC = {"svg.fonttype": "none", "svg.hashsalt": "megatron_rl", "font.size": 9, "axes.spines.top": False,
      "axes.spines.right": False, "axes.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK,
      "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.formatter.useoffset": False,
      "axes.formatter.limits": (-3, 5), "lines.linewidth": 1.4, "legend.frameon": False}

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """Lines over steps. series: metric name -> legend label, in drawing order; constants are drawn dashed.

    per_layer: a prefix instead of series; a line per layer that follows it, faint for the first, strong for the last.
    """

    title: str
    unit: str
    series: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    per_layer: str = ""


@dataclass(frozen=True)
class Key:
    """One legend entry: a colour (CSS) and a border style (CSS) for the line it stands for."""

    label: str
    color: str
    style: str = "solid"


@dataclass(frozen=True)
class Drawing:
    """A plot and its legend. The page writes the legend, so that it wraps where a plot would cut it off."""

    svg: str
    legend: tuple[Key, ...] = ()


PLOTS = (
    Plot("Reward", "mean reward", {"reward/mean": "mean reward"}),
    Plot("Groups with a signal", "fraction", {"rollout/groups_mixed_fraction": "mixed groups",
                                              "reward/pass_rate": "pass rate"},
         note="A group teaches something only if its responses differ in reward."),
    Plot("Policy entropy", "nats per token", {"train/entropy": "entropy"}),
    Plot("Response length", "tokens", {"rollout/response_tokens_mean": "mean length"}),
    Plot("Truncated responses", "fraction", {"rollout/truncated_fraction": "cut at the length limit"}),
    Plot("Budget fill", "selected / Phi", {"budget/fill": "fill"}),
    Plot("Tokens per step", "tokens", {"rollout/generated_tokens": "generated", "budget/selected_tokens": "trained"},
         constants={"budget/phi": "Phi"}),
    Plot("Loss", "loss", {"train/loss": "loss"}),
    Plot("Gradient norm", "L2 norm", {"train/grad_norm": "gradient norm"}),
    Plot("KL to the reference", "nats per token", {"train/kl": "KL"}),
    Plot("Trainer against engine", "absolute log-probability gap", {"mismatch/mean_abs": "mean",
                                                                    "mismatch/max_abs": "largest"}),
    Plot("Clipped tokens", "fraction", {"train/clip_low_fraction": "at the lower bound",
                                        "train/clip_high_fraction": "at the upper bound"}),
    Plot("Expert load, mean over layers", "max / mean", {"router/load_max_over_mean": "all layers"},
         note="1 is perfect balance; the number of experts over top-k is the worst case."),
    Plot("Expert load by layer", "max / mean", per_layer="router/load_max_over_mean/layer_"),
    Plot("Direct answers", "fraction", {"style/direct_share": "answered without reasoning",
                                        "style/reasoning_accuracy": "accuracy of those that reason"}),
    Plot("Throughput", "tokens/s", {"tokens_per_s/rollout": "rollout", "tokens_per_s/train": "training"}),
    Plot("Model FLOPs", "TFLOP/s", {"flops/model_tflops_per_s": "training"}),
)

# The phases that follow each other in a step; time/step holds them all.
PHASES = ("generate", "reward", "logprobs", "train", "publish", "eval", "save")


def series_of(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have a finite number under `key`, float64 [n]."""
    pairs = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    return np.array([step for step, _ in pairs], dtype=float), np.array([value for _, value in pairs], dtype=float)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def run_keys(names: Sequence[str]) -> tuple[Key, ...]:
    """The legend shared by all plots of a comparison: a colour is a run."""
    return tuple(Key(name, _css(index)) for index, name in enumerate(names))


def draw(plot: Plot, runs: Mapping[str, Rows]) -> Drawing | None:
    """The plot, or None when no run has any of its metrics. Several runs: a colour is a run, a dash a metric."""
    series = plot.series
    if plot.per_layer:
        if len(runs) > 1:
            return None
        series = _per_layer(plot.per_layer, *runs.values())
    lines = [(run_index, index, steps, values) for run_index, rows in enumerate(runs.values())
             for index, (steps, values) in enumerate(series_of(rows, key) for key in series) if len(steps)]
    if not lines:
        return None
    figure, axes = _figure(plot.unit)
    legend: dict[int, Key] = {}
    labels = list(series.values())
    for run_index, index, steps, values in lines:
        if plot.per_layer:
            strength = 0.25 + 0.75 * index / max(len(series) - 1, 1)
            _line(axes, steps, values, SERIES[0], alpha=strength)
            if index in (0, len(series) - 1):
                legend[index] = Key(labels[index], f"color-mix(in srgb, {_css(0)} {strength:.0%}, transparent)")
        elif len(runs) == 1:
            _line(axes, steps, values, SERIES[index % len(SERIES)])
            legend[index] = Key(labels[index], _css(index))
        else:
            dash, style = DASHES[index % len(DASHES)]
            _line(axes, steps, values, SERIES[run_index % len(SERIES)], dash)
            legend[index] = Key(labels[index], "var(--ink)", style)
    keys = [legend[index] for index in sorted(legend)]
    for key, label in plot.constants.items():
        drawn = [constant for constant in (series_of(rows, key) for rows in runs.values()) if len(constant[0])]
        for steps, values in drawn:
            axes.plot(steps, values, color=INK, linestyle=(0, (1.5, 2)), linewidth=1.0)
        keys += [Key(label, "var(--ink)", "dotted")] if drawn else []
    _finish(axes, max(float(steps.max()) for _, _, steps, _ in lines))
    return Drawing(to_svg(figure, plot.title), tuple(keys) if len(keys) > 1 else ())


def draw_accuracy(evaluations: Mapping[str, Rows]) -> Drawing | None:
    """Held-out accuracy with its interval against the step, one colour per run; None without evaluations.

    Of two evaluations at one step (before and after SFT) the later one is drawn.
    """
    figure, axes = _figure("held-out accuracy")
    last_step = None
    for index, rows in enumerate(evaluations.values()):
        latest = {row["step"]: row for row in rows if is_number(row.get("accuracy"))}
        if not latest:
            continue
        steps = np.array(sorted(latest), dtype=float)
        accuracy, low, high = (np.array([latest[step].get(key, latest[step]["accuracy"]) for step in sorted(latest)])
                               for key in ("accuracy", "low", "high"))
        axes.errorbar(steps, accuracy, yerr=[accuracy - low, high - accuracy], color=SERIES[index % len(SERIES)],
                      marker="o", markersize=3.5, capsize=2.5, linewidth=1.4, elinewidth=0.9)
        last_step = max(float(steps.max()), last_step or 0.0)
    if last_step is None:
        return None
    axes.set_ylim(bottom=0.0)
    _finish(axes, last_step)
    return Drawing(to_svg(figure, "Held-out accuracy"))


def draw_times(rows: Rows, title: str) -> Drawing | None:
    """Seconds per phase of one run, stacked over the steps; None when no phase was timed."""
    timed = [row for row in rows if any(is_number(row.get(f"time/{phase}")) for phase in PHASES)]
    if not timed:
        return None
    figure, axes = _figure("seconds")
    steps = np.array([row["step"] for row in timed], dtype=float)
    present = [phase for phase in PHASES if any(is_number(row.get(f"time/{phase}")) for row in timed)]
    width = float(np.diff(steps).min()) if len(steps) > 1 else 1.0
    edges = np.append(steps - width / 2, steps[-1] + width / 2)
    base = np.zeros(len(edges))
    for index, phase in enumerate(present):
        seconds = np.array([row[f"time/{phase}"] if is_number(row.get(f"time/{phase}")) else 0.0 for row in timed])
        top = base + np.append(seconds, seconds[-1])
        axes.fill_between(edges, base, top, step="post", color=SERIES[index % len(SERIES)], linewidth=0)
        base = top
    axes.set_ylim(bottom=0.0)
    _finish(axes, float(steps.max()))
    return Drawing(to_svg(figure, title), tuple(Key(phase, _css(index)) for index, phase in enumerate(present)))


def to_svg(figure: Figure, title: str) -> str:
    """An <svg> element without prologue, metadata or ids of its own that another plot could share."""
    buffer = io.StringIO()
    with matplotlib.rc_context(RC):
        FigureCanvasSVG(figure).print_svg(buffer)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = svg.replace(INK, "var(--ink)")
    for index, color in enumerate(SERIES):
        svg = svg.replace(color, f"var(--series-{index})")
    # Without width and height the page decides the size; viewBox keeps the proportions.
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{html.escape(title)}">{rest}'


def _figure(unit: str) -> tuple[Figure, Any]:
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _line(
    axes: Any, steps: np.ndarray, values: np.ndarray, color: str, dash: str = "-", alpha: float = 1.0
) -> None:
    """Every step faint and a centred running mean strong for long runs; short runs as they are."""
    if len(steps) == 1:
        axes.plot(steps, values, color=color, marker="o", markersize=3.5, linestyle="none", alpha=alpha)
        return
    if len(steps) >= SMOOTH_FROM_STEPS:
        axes.plot(steps, values, color=color, linestyle="-", linewidth=0.7, alpha=0.3 * alpha)
        values = running_mean(values, smoothing_window(len(steps)))
    axes.plot(steps, values, color=color, linestyle=dash, alpha=alpha)


def smoothing_window(num_steps: int) -> int:
    """Odd number of steps in a running mean: a tenth of the run."""
    return num_steps // 10 // 2 * 2 + 1


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` (odd) values around each place; over those that exist at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first = np.maximum(places - window // 2, 0)
    end = np.minimum(places + window // 2 + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _finish(axes: Any, last_step: float) -> None:
    """Whole steps on the x axis, and room for the last of them."""
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.set_xlim(right=last_step * 1.02 + 0.5)


def _css(index: int) -> str:
    return f"var(--series-{index % len(SERIES)})"


def _per_layer(prefix: str, rows: Rows) -> dict[str, str]:
    """The metrics `prefix<number>` that occur, by number, with legend labels."""
    found = {name for row in rows for name in row if name.startswith(prefix)}
    return {name: f"layer {name.removeprefix(prefix)}" for name in sorted(found, key=lambda name: (len(name), name))}
