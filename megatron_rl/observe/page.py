"""The frame of a report: one HTML page that needs no other file, light or dark as the reader's system is."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_rl.observe.canvas import Drawing, Key

HERE = Path(__file__).parent
STYLE, SCRIPT = HERE / "page.css", HERE / "page.js"
DIGITS = 5  # of a value under the pointer


def text(value: object) -> str:
    return html.escape(str(value))


def page(title: str, body: Iterable[str]) -> str:
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
            f"<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n" + "\n".join(body)
            + f"\n<script>\n{SCRIPT.read_text()}</script>\n</body>\n</html>\n")


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers_from: int | None = None) -> str:
    """Columns from numbers_from on are right-aligned. Cells are escaped; a wide table scrolls by itself."""
    def cells(tag: str, values: Sequence[object]) -> str:
        first_number = len(values) if numbers_from is None else numbers_from
        return "".join(f'<{tag}{" class=number" if index >= first_number else ""}>{text(value)}</{tag}>'
                       for index, value in enumerate(values))

    head, lines = f"<tr>{cells('th', header)}</tr>", "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{lines}</tbody></table></div>'


def legend(keys: Iterable[Key]) -> str:
    inner = "".join(f'<span><i style="border-top-style:{key.style};border-top-color:{key.color}"></i>'
                    f"{text(key.label)}</span>" for key in keys)
    return f'<div class="legend">{inner}</div>' if inner else ""


def figure(title: str, drawing: Drawing, note: str = "") -> str:
    """A plot with its numbers, which page.js shows at the step under the pointer."""
    caption = f"{text(title)}<span>{text(note)}</span>" if note else text(title)
    lines = [{"label": line.label, "color": line.color, "steps": [int(step) for step in line.steps],
              "values": [float(f"{value:.{DIGITS}g}") for value in line.values]} for line in drawing.lines]
    numbers = text(json.dumps({"box": [round(edge, 5) for edge in drawing.box], "lines": lines}, separators=(",", ":")))
    return (f"<figure><figcaption>{caption}</figcaption>{legend(drawing.legend)}"
            f'<div class="plot" data-numbers="{numbers}">{drawing.svg}</div></figure>')


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """(value, what it is) pairs as a row of figures."""
    inner = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in items)
    return f'<div class="tiles">{inner}</div>'
