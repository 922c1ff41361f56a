"""The frame of a report: one HTML page that needs no other file, light or dark as the reader's system is.

page.js draws the plots from the numbers that they carry, so that a reader can change their axes.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.observe.plots import Drawing, Key, Line, smoothing_window

HERE = Path(__file__).parent
STYLE, SCRIPT = HERE / "page.css", HERE / "page.js"
DIGITS = 5  # of a value
SHORT_TEXT = 160  # characters of a sampled text that are shown before it is opened
AXES = {"step": "step", "time": "time", "tokens": "trained tokens"}


def text(value: object) -> str:
    return html.escape(str(value))


def page(title: str, body: Iterable[str]) -> str:
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
            f"<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n"
            "<noscript><p><b>The plots of this page need JavaScript.</b></p></noscript>\n" + "\n".join(body)
            + f"\n<script>\n{SCRIPT.read_text()}</script>\n</body>\n</html>\n")


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers_from: int | None = None) -> str:
    """Columns from numbers_from on are right-aligned. Cells are escaped; a wide table scrolls by itself."""
    first_number = len(header) if numbers_from is None else numbers_from
    return _table(header, ([text(cell) for cell in row] for row in rows), range(first_number, len(header)))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """rows: of HTML. The frame around the table shows at its edges that it scrolls (page.css)."""
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f'<{tag}{" class=number" if index in numbers else ""}>{value}</{tag}>'
                       for index, value in enumerate(values))

    head = f"<tr>{cells('th', [text(name) for name in header])}</tr>"
    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>{lines}</tbody></table></div>'


def legend(keys: Iterable[Key]) -> str:
    inner = "".join(f'<span><i style="border-top-style:{key.style};border-top-color:{key.color}"></i>'
                    f"{text(key.label)}</span>" for key in keys)
    return f'<div class="legend">{inner}</div>' if inner else ""


def figure(title: str, drawing: Drawing, note: str = "") -> str:
    """A plot as its numbers, which page.js draws."""
    caption = f"{text(title)}<span>{text(note)}</span>" if note else text(title)
    options = {"title": title, "unit": drawing.unit, "fromZero": drawing.from_zero,
               "stacked": drawing.stacked, "log": drawing.log, "x": drawing.x, "band": drawing.band,
               "ring": drawing.ring, "lines": [_line(line, drawing.smooth) for line in drawing.lines]}
    numbers = text(json.dumps(options, separators=(",", ":")))
    return (f"<figure><figcaption>{caption}</figcaption>{legend(drawing.legend)}"
            f'<div class="plot" role="img" aria-label="{text(title)}" data-numbers="{numbers}"></div></figure>')


def _line(line: Line, smooth: bool) -> dict[str, Any]:
    intervals = {} if line.low is None or line.high is None else {"low": _numbers(line.low),
                                                                  "high": _numbers(line.high)}
    return {"label": line.label, "color": line.color, "style": line.style, "run": line.run,
            "constant": line.constant, "window": smoothing_window(len(line.steps)) if smooth else 1,
            "steps": [int(step) for step in line.steps], "values": _numbers(line.values), **intervals}


def _numbers(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def steps(axes: Sequence[Mapping[str, Sequence[float]]], inner: str) -> str:
    """A part of the page whose plots share their axes: a bar to choose them, then `inner`.

    axes: of each run, what its steps stand for (plots.axes_of). An axis that a run lacks is not offered.
    """
    offered = [name for name in AXES if all(len(run[name]) for run in axes)]
    buttons = "".join(f'<button type="button" data-x="{name}" aria-pressed="{str(name == "step").lower()}">'
                      f"{text(AXES[name])}</button>" for name in offered)
    bar = (f'<div class="bar"><span>x axis</span>{buttons}<label><input type="checkbox" class="log"> log scale</label>'
           "</div>")
    numbers = text(json.dumps(axes, separators=(",", ":")))
    return f'<div class="steps" data-axes="{numbers}">{bar}{inner}</div>'


def samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of sampled responses with a field to search it and a choice of verdicts. Long texts open on a click."""
    verdicts = sorted({row["status"] for row in rows})
    choice = "".join(f"<option>{text(verdict)}</option>" for verdict in verdicts)
    bar = ('<div class="bar"><input type="search" placeholder="search prompts and responses" '
           'aria-label="search prompts and responses"><select aria-label="verdict"><option value="">all verdicts'
           f'</option>{choice}</select><span class="found">{len(rows):,} responses</span></div>')
    cells = [[text(row["step"]), f'<span class="verdict {text(row["status"])}">{text(row["status"])}</span>',
              text(f"{row['reward']:.4g}"), text(row["response_tokens"]), _text(row["prompt"]), _text(row["response"]),
              _text(row["answer"])] for row in rows]
    header = ["step", "verdict", "reward", "tokens", "prompt", "response", "reference"]
    return f'<div class="samples">{bar}{_table(header, cells, (2, 3))}</div>'


def _text(value: str) -> str:
    if len(value) <= SHORT_TEXT:
        return f"<div class=sample>{text(value)}</div>"
    return (f"<details class=sample><summary>{text(value[:SHORT_TEXT])} \u2026</summary>"
            f"<div>{text(value)}</div></details>")


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """(value, what it is) pairs as a row of figures."""
    inner = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in items)
    return f'<div class="tiles">{inner}</div>'
