"""The figure of an ablation: lines over steps (mean and range over seeds), or a point per arm beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_rl.ablations.driver import Plan
from megatron_rl.ablations.results import Table, mean_and_spread, series
from megatron_rl.ablations.spec import Ablation, Panel

COLOURS = ("#0072b2", "#d55e00", "#008e65", "#b5548c", "#b07800", "#2f9fd8")
DASHES = ("-", "--", ":", "-.")  # of the arms that share a colour
PANEL_IN = (4.2, 2.7)
RC = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
      "axes.titlesize": 10, "lines.linewidth": 1.3, "legend.frameon": False}


def draw(ablation: Ablation, todo: Plan, table: Table, seeds: Sequence[int], path: Path) -> None:
    """Write the figure as PNG, two panels to a row, an arm in one colour and dash throughout."""
    rows = (len(ablation.panels) + 1) // 2
    columns = min(2, len(ablation.panels))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(PANEL_IN[0] * columns, PANEL_IN[1] * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(ablation.panels):]:
            axes.set_visible(False)
        for panel, axes in zip(ablation.panels, grid.flat, strict=False):
            axes.set_title(panel.title, loc="left")
            axes.grid(axis="y", alpha=0.2, linewidth=0.5)
            if panel.metric is not None:
                _lines(axes, panel, ablation, todo, seeds)
            else:
                _points(axes, panel, ablation, table)
        handles = {handle.get_label(): handle for axes in grid.flat for handle in axes.get_legend_handles_labels()[0]}
        if handles:
            figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=2)
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _lines(axes: Any, panel: Panel, ablation: Ablation, todo: Plan, seeds: Sequence[int]) -> None:
    """Mean over the seeds, and a band from the lowest to the highest; not smoothed, since swings are what is asked."""
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    for place, (arm, label) in enumerate(ablation.arms.items()):
        runs = [series(run.folder, panel.metric) for run in todo.runs if run.arm == arm and run.seed in seeds]
        runs = [run for run in runs if len(run[0])]
        if not runs:
            continue
        steps = runs[0][0]
        values = np.stack([values for _, values in runs])
        colour, turn = COLOURS[place % len(COLOURS)], place // len(COLOURS)
        axes.plot(steps, values.mean(axis=0), color=colour, linestyle=DASHES[turn % len(DASHES)], label=label)
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _points(axes: Any, panel: Panel, ablation: Ablation, table: Table) -> None:
    """A point per arm with its standard deviation over seeds; the paper's numbers on the right-hand axis."""
    axes.set_ylabel(panel.unit)
    arms = [arm for arm in ablation.arms if arm in table]
    for place, arm in enumerate(arms):
        mean, spread = mean_and_spread(table[arm][panel.column])
        axes.errorbar(place, mean, yerr=np.nan_to_num(spread), marker="o", capsize=3, color=COLOURS[0],
                      label="ours" if place == 0 else None)
    axes.set_xticks(range(len(arms)), [ablation.arms[arm] for arm in arms], fontsize=8)
    axes.set_xlim(-0.5, len(arms) - 0.5)
    known = [(place, panel.paper[arm]) for place, arm in enumerate(arms) if arm in panel.paper]
    if known:
        beside = axes.twinx()
        beside.spines["right"].set_visible(True)
        beside.set_ylabel(panel.paper_unit)
        beside.plot(*zip(*known, strict=True), marker="s", linestyle=":", color=COLOURS[1], label="the paper's")
        axes.plot([], [], marker="s", linestyle=":", color=COLOURS[1], label="the paper's")
