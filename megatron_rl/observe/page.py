"""The frame of a report: one HTML page that needs no other file, light or dark as the reader's system is."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from megatron_rl.observe.plots import Drawing, Key

# Eight colours told apart by colour-blind readers (Okabe and Ito), darkened or lightened for the background.
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --panel: #f6f7f9; --ink: #1d2430; --quiet: #5a6474; --line: #d9dde4;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #008e65; --series-3: #b5548c; --series-4: #b07800;
  --series-5: #2f9fd8; --series-6: #6a51a3; --series-7: #70757d; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --panel: #1c2027; --ink: #e4e8ee; --quiet: #9aa4b2;
  --line: #343b46; --series-0: #56b4e9; --series-1: #ff8a4c; --series-2: #2fc79a; --series-3: #e48fc0;
  --series-4: #e6b63c; --series-5: #9bd3f5; --series-6: #b4a0e8; --series-7: #aab1bb; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 20px 16px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 32px 0 10px; }
p { margin: 6px 0; max-width: 80ch; }
.quiet, figcaption span { color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 16px 0; }
.tile { background: var(--panel); border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 18px; font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile span { color: var(--quiet); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: 10px 10px 6px; min-width: 0; }
figcaption { font-weight: 600; padding: 0 2px 4px; }
figcaption span { display: block; font-weight: 400; font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 0 2px 4px; font-size: 13px; }
.legend span { overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 22px; border-top-width: 3px; vertical-align: middle; margin-right: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; }
code, pre { font: 13px/1.45 ui-monospace, "Liberation Mono", monospace; }
pre { overflow-x: auto; background: var(--panel); border-radius: 8px; padding: 10px 12px; margin: 8px 0; }
summary { cursor: pointer; }
"""


def text(value: object) -> str:
    return html.escape(str(value))


def page(title: str, body: Iterable[str]) -> str:
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n")


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
    caption = f"{text(title)}<span>{text(note)}</span>" if note else text(title)
    return f"<figure><figcaption>{caption}</figcaption>{legend(drawing.legend)}{drawing.svg}</figure>"


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """(value, what it is) pairs as a row of figures."""
    inner = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in items)
    return f'<div class="tiles">{inner}</div>'
