"""From lines to an inline SVG that takes its colours from the page (light and dark) and knows its own numbers."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["INK", "SERIES", "SMOOTH_FROM_STEPS", "Canvas", "Drawing", "Key", "Line", "css", "running_mean",
           "smoothing_window"]

# Stand-ins that the SVG's text replaces by CSS variables; matplotlib writes colours as lower-case hex.
INK = "#0a0b0c"
SERIES = tuple(f"#f0000{index}" for index in range(8))
SMOOTH_FROM_STEPS = 40
# Small on purpose: shown 340 to 400 CSS pixels wide, the labels are then 10 to 12 pixels.
SIZE_IN = (4.0, 2.45)
RC = {"svg.fonttype": "none", "svg.hashsalt": "megatron_rl", "font.size": 9, "axes.spines.top": False,
      "axes.spines.right": False, "axes.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK,
      "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.formatter.useoffset": False,
      "axes.formatter.limits": (-3, 5), "lines.linewidth": 1.4, "legend.frameon": False}


@dataclass(frozen=True)
class Key:
    """One legend entry: a colour (CSS) and a border style (CSS) for the line it stands for."""

    label: str
    color: str
    style: str = "solid"


@dataclass(frozen=True)
class Line:
    """What the reader is told of a line at a step: steps and values [n]."""

    label: str
    color: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Drawing:
    """A plot, its legend and its numbers. The page writes the legend, so that it wraps where a plot would cut it off.

    box: (left, right, first, last), the axes' ends as fractions of the width and the steps that stand there.
    """

    svg: str
    legend: tuple[Key, ...]
    lines: tuple[Line, ...]
    box: tuple[float, float, float, float]


class Canvas:
    """One pair of axes over the steps."""

    def __init__(self, unit: str):
        with matplotlib.rc_context(RC):
            self._figure = Figure(figsize=SIZE_IN, layout="constrained")
            self.axes: Any = self._figure.add_subplot()
            self.axes.set_xlabel("step")
            self.axes.set_ylabel(unit)
        self._figure.patch.set_visible(False)
        self.axes.patch.set_visible(False)
        self.axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.5)
        self.axes.set_axisbelow(True)

    def line(self, steps: np.ndarray, values: np.ndarray, color: str, dash: str = "-", alpha: float = 1.0, *,
             smooth: bool = True) -> None:
        """smooth: of long runs every step faint and a centred running mean strong. A single step is a dot."""
        if len(steps) == 1:
            self.axes.plot(steps, values, color=color, marker="o", markersize=3.5, linestyle="none", alpha=alpha)
            return
        if smooth and len(steps) >= SMOOTH_FROM_STEPS:
            self.axes.plot(steps, values, color=color, linestyle="-", linewidth=0.7, alpha=0.3 * alpha)
            values = running_mean(values, smoothing_window(len(steps)))
        self.axes.plot(steps, values, color=color, linestyle=dash, alpha=alpha)

    def finish(self, title: str, legend: Sequence[Key], lines: Sequence[Line], *, from_zero: bool = False) -> Drawing:
        """Whole steps on the x axis, room for the last of them, no y axis that magnifies a constant."""
        axes = self.axes
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.set_xlim(right=max(float(line.steps.max()) for line in lines) * 1.02 + 0.5)
        low, high = axes.get_ylim()
        least, most = axes.dataLim.y0, axes.dataLim.y1
        if least == most:
            room = abs(least) / 4 or 1.0
            low, high = least - room, least + room
        if from_zero and least >= 0.0:
            low = -0.02 * high  # a line along zero stands beside the axis
        axes.set_ylim(low, high)
        svg = _svg(self._figure, title)
        place = axes.get_position()  # after drawing: the layout is done
        return Drawing(svg, tuple(legend), tuple(lines), (place.x0, place.x1, *axes.get_xlim()))


def _svg(figure: Figure, title: str) -> str:
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


def css(index: int) -> str:
    """The colour of a series, as the page names it."""
    return f"var(--series-{index % len(SERIES)})"
