"""What the benchmarks share: rows of the table, interleaved timing, memory of one call, and the baseline files.

A claim is a ratio of two things measured in one run, in turn; seconds alone are shown but never judged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

BASELINES = Path(__file__).resolve().parent / "baselines"


@dataclass(frozen=True)
class Row:
    """One line: what was measured, ours, the anchor's (None: there is none), and the limit that judges the ratio.

    ratio is ours / anchor, or ours itself without an anchor. holds: `ratio <= limit` or `ratio >= limit`.
    """

    claim: str
    ours: float
    anchor: float | None = None
    unit: str = ""
    limit: float | None = None
    holds: Literal["at most", "at least"] = "at most"

    @property
    def ratio(self) -> float:
        return self.ours if self.anchor is None else self.ours / self.anchor

    @property
    def passed(self) -> bool | None:
        if self.limit is None:
            return None
        return self.ratio <= self.limit if self.holds == "at most" else self.ratio >= self.limit


def interleaved(functions: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, by name; the functions take turns, in changing order, so that a slow phase meets all."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(-warmup, repeats):
        for name in names if turn % 2 else reversed(names):
            started = time.perf_counter()
            functions[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def median_ratio(ours: Sequence[float], anchor: Sequence[float]) -> float:
    """Median over the turns of ours / anchor of the same turn."""
    return statistics.median(a / b for a, b in zip(ours, anchor, strict=True))


def variation(values: Sequence[float]) -> float:
    """Coefficient of variation: sample standard deviation over mean."""
    return statistics.stdev(values) / statistics.mean(values)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a spawned process, which has no other memory and no other state."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_growth_bytes(function: Callable[[], Any]) -> int:
    """Peak resident memory of this process during the call, less what is resident before it (Linux, proc(5)).

    Call it in a fresh process: an allocator that holds freed memory hides what a second call needs.
    """
    def resident(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def load_average() -> float:
    return os.getloadavg()[0]


def format_table(rows: Sequence[Row]) -> str:
    """Columns: claim, ours, anchor, ratio, limit, verdict."""
    lines = [("claim", "ours", "anchor", "ratio", "limit", "")]
    for row in rows:
        limit = "" if row.limit is None else f"{'<=' if row.holds == 'at most' else '>='} {row.limit:g}"
        verdict = {None: "", True: "holds", False: "MISSED"}[row.passed]
        anchor = "" if row.anchor is None else f"{row.anchor:.4g}"
        lines.append((row.claim, f"{row.ours:.4g} {row.unit}".rstrip(), anchor, f"{row.ratio:.4g}", limit, verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)


def main(name: str, measure: Callable[..., tuple[list[Row], dict[str, Any]]], **options: Any) -> None:
    """The command line of one benchmark. measure(quick=..., **options) returns rows and details.

    options: further `--flags` with their defaults. A full run writes baselines/NAME.json, a quick one only prints.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="seconds, not minutes; times are not judged or saved")
    parser.add_argument("--no-save", action="store_true", help="print only")
    for option, default in options.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    load, printed_only = load_average(), arguments.pop("no_save")
    rows, details = measure(**arguments)
    print(f"{name}\n{format_table(rows)}")
    if not (arguments["quick"] or printed_only):
        save(name, rows, details, arguments, load)


def save(name: str, rows: Sequence[Row], details: dict[str, Any], arguments: dict[str, Any], load: float) -> Path:
    """Write the result with the machine, versions and load that it was made with."""
    from megatron_rl.observe.versions import collect_versions

    path = BASELINES / f"{name}.json"
    content = {"measured": datetime.now(UTC).strftime("%Y-%m-%d"), "arguments": arguments, "load_before": load,
               "rows": [asdict(row) for row in rows], "details": details, "versions": collect_versions()}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def load_rows(name: str) -> list[Row]:
    """The rows of a stored baseline; empty when it was never measured."""
    path = BASELINES / f"{name}.json"
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] if path.is_file() else []
