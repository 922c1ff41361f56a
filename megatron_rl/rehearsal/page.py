"""A rehearsal as a page to look at: memory over the step, what fills it, who talks to whom, and the stages on one
clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_rl.config.schema import Config
from megatron_rl.observe.page import figure, page, table, text, tiles
from megatron_rl.observe.plots import Drawing, Key, Line, css
from megatron_rl.plan.report import layout
from megatron_rl.rehearsal.rates import RatesFile
from megatron_rl.rehearsal.report import GB, LIMITS
from megatron_rl.rehearsal.timeline import Slice

ROWS = 30
"""The most that a table shows; --json has all."""
SHOWN_SHARE = 0.0015
"""Slices that take less of the whole time are drawn with their neighbours, as what most of the time goes to."""
AND_OTHERS = " and others"
COLOURS = {"compute": css(0), "wait": "transparent"}


def rehearsal_page(config: Config, found: Sequence[dict[str, Any]], slices: Mapping[int, Sequence[Slice]],
                   rates: RatesFile) -> str:
    """found: summary.summary of each rank. slices: timeline.simulate of their updates."""
    title = f"{config.run.name}: {layout(config.parallel)}, recompute={config.model.recompute}"
    body = [f"<h1>{text(title)}</h1>", f"<p>{text(LIMITS)}. {text(rates.stated())}</p>", _stages(found),
            "<h2>The update on one clock</h2>", _clock(slices)]
    for each in found:
        body += _rank(each)
    return page(f"rehearsal of {title}", body)


def collectors_page(config: Config, rows: Sequence[dict[str, Any]], assumed: Sequence[str]) -> str:
    """rows: whole_step.whole_steps; a bar for each collector, on one scale."""
    title = f"{config.run.name}: whole steps by collector, {layout(config.parallel)}"
    longest = max(row["seconds"] for row in rows)
    parts = ("rollout", "train", "publish")
    legend = "".join(f'<span><i style="border-top-style:solid;border-top-color:{css(place)}"></i>{part}</span>'
                     for place, part in enumerate(parts))
    bars = "".join(
        f'<div style="display:flex;align-items:center;gap:.6em;margin:.3em 0"><span style="min-width:14em">'
        f'{text(_named(row))}</span><div style="display:flex;flex:1;height:1.6em">' + "".join(
            f'<div title="{part}: {row[part]:.1f} s" style="width:{100 * row[part] / longest:.3f}%;'
            f'background:{css(place)}"></div>' for place, part in enumerate(parts)) + "</div></div>" for row in rows)
    return page(f"collectors of {config.run.name}", [
        f"<h1>{text(title)}</h1>", *(f"<p>assumed: {text(each)}</p>" for each in assumed),
        f'<div class="legend">{legend}<span>where the ranks spend a step</span></div>{bars}',
        table(["collector", "engines", "GPUs", "step s", "rollout s", "train s", "publish s", "engines busy", "dropped",
               "staleness", "oldest", "steps a day", "Gtok a day", "tok/s/GPU", "its CV"], [
            [_named(row), row["engines"], row["gpus"], f"{row['seconds']:.1f}", f"{row['rollout']:.1f}",
             f"{row['train']:.1f}", f"{row['publish']:.1f}", f"{row['engine_busy']:.0%}",
             f"{row['dropped'] / max(1.0, row['generated']):.1%}", f"{row['staleness']:.2f}", row["oldest"],
             f"{row['steps_per_day']:,.0f}", f"{row['tokens_per_day'] / GB:.2f}",
             f"{row['tokens_per_s_per_gpu']:,.0f}", f"{row['tokens_per_s_cv']:.1%}"] for row in rows], numbers_from=1)])


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['collector']}, engines {'on the ranks' if row['colocated'] else 'apart'}"


def _stages(found: Sequence[dict[str, Any]]) -> str:
    return table(["rank", "stage", "context rank", "peak GB", "TFLOP", "TB moved", "seconds of the update",
                  "seconds of a step"], [
        [each["rank"], each["place"]["pp"], each["place"]["cp"], f"{each['peak']['bytes'] / GB:.2f}",
         f"{each['phases']['update']['flops'] / 1e12:.1f}", f"{each['phases']['update']['traffic_bytes'] / 1e12:.3f}",
         f"{each['phases']['update']['elapsed']:.3f}", f"{sum(each['step_seconds'].values()):.1f}"]
        for each in found], numbers_from=0)


def _rank(each: dict[str, Any]) -> list[str]:
    phases, parameters, peak = each["phases"], each["parameters"], each["peak"]
    sent = sum(row["bytes"] for row in each["collectives"])
    reads = sum(row["count"] for row in each["host_reads"])
    return [
        f"<h2>Rank {each['rank']}</h2>",
        tiles([(f"{sum(parameters.values()):,}", "parameters"),
               (f"{peak['bytes'] / GB:.2f} GB", f"peak, {peak['phase']}"),
               (f"{sum(each['step_seconds'].values()):.1f} s", "one optimiser step, estimated"),
               (f"{sum(phase['flops'] for phase in phases.values()) / 1e12:.1f} TFLOP", "rehearsed"),
               (f"{sent / GB:.1f} GB", "in collectives"), (f"{reads:,}", "reads by the host")]),
        figure("bytes alive over the rehearsed step", _memory(each["curve"]), "GB, by operations so far"),
        "<h3>What fills the peak</h3>",
        table(["GB", "rehearsed", "plan", "difference"], [
            [kind, f"{sizes['rehearsed'] / GB:.3f}", f"{sizes['plan'] / GB:.3f}",
             f"{sizes['rehearsed'] / sizes['plan'] - 1:+.1%}" if sizes["plan"] else ""]
            for kind, sizes in each["plan"].items() if sizes["plan"] or sizes["rehearsed"]], numbers_from=1),
        table(["GB", "tensors", "kind", "type and shape", "operation", "made by"], [
            [f"{row['bytes'] / GB:.3f}", row["count"], row["kind"],
             f"{row['dtype']} [{'x'.join(map(str, row['shape']))}]", row["operation"].removeprefix("aten."),
             row["where"]] for row in each["census"][peak["phase"]][:ROWS]]),
        "<h3>Phases</h3>",
        table(["phase", "peak GB", "TFLOP", "TB moved", "kernels", "host reads", "seconds", "most of them"], [
            [name, f"{phase['peak_bytes'] / GB:.2f}", f"{phase['flops'] / 1e12:.2f}",
             f"{phase['traffic_bytes'] / 1e12:.3f}", f"{phase['kernels']:,}", phase["host_reads"],
             f"{phase['elapsed']:.3f}", _spent(phase["seconds"])] for name, phase in phases.items()],
            numbers_from=1),
        "<h3>Collectives</h3>",
        table(["phase", "operation", "group", "ranks", "link", "calls", "GB", "asked for by"], [
            [row["phase"], row["operation"], row["group"], row["size"], row["link"], row["calls"],
             f"{row['bytes'] / GB:.3f}", ", ".join(f"{where} ({count})" for where, count in row["where"].items())]
            for row in sorted(each["collectives"], key=lambda row: -row["bytes"])[:ROWS]]),
        "<h3>Where the host waits</h3>",
        table(["times", "phase", "line"], [[row["count"], row["phase"], row["where"]] for row in sorted(
            each["host_reads"], key=lambda row: -row["count"])[:ROWS]]),
        "<h3>Operations that move most</h3>",
        table(["phase", "operation", "calls", "TB", "TFLOP"], [
            [row["phase"], row["name"], f"{row['calls']:,}", f"{row['bytes'] / 1e12:.3f}",
             f"{row['flops'] / 1e12:.2f}"] for row in each["operations"][:ROWS]], numbers_from=2)]


def _spent(seconds: Mapping[str, float]) -> str:
    whole = sum(seconds.values())
    return ", ".join(f"{name} {value / whole:.0%}" for name, value in sorted(
        seconds.items(), key=lambda item: -item[1]) if value >= 0.05 * whole)


def _memory(curve: Sequence[tuple[int, str, int]]) -> Drawing:
    """A colour for each phase, which begins where the one before it ended."""
    lines: list[Line] = []
    for phase in dict.fromkeys(phase for _, phase, _ in curve):
        points = [place for place, (_, name, _) in enumerate(curve) if name == phase]
        chosen = [curve[place] for place in ([points[0] - 1] if points[0] else []) + points]
        lines.append(Line(phase, css(len(lines)), np.array([count for count, _, _ in chosen], dtype=float),
                          np.array([size / GB for _, _, size in chosen])))
    return Drawing("GB", lines, [Key(line.label, line.color) for line in lines], from_zero=True, x="operation")


def _clock(slices: Mapping[int, Sequence[Slice]]) -> str:
    """A bar for each rank, whose parts say what they are under the pointer."""
    slices = {rank: [each for each in rows if not each.lane] for rank, rows in slices.items()}
    end = max((each.start + each.seconds for rows in slices.values() for each in rows), default=0.0)
    if not end:
        return "<p>nothing took any time</p>"
    kinds = sorted({_kind(each.name) for rows in slices.values() for each in rows} - COLOURS.keys())
    colours = COLOURS | {kind: css(1 + place) for place, kind in enumerate(kinds)}
    legend = "".join(f'<span><i style="border-top-style:solid;border-top-color:{colours[kind]}"></i>{text(kind)}</span>'
                     for kind in ("compute", *kinds))
    bars = "".join(
        f'<div style="display:flex;align-items:center;gap:.6em;margin:.3em 0"><span style="min-width:5em">rank '
        f'{rank}</span><div style="position:relative;flex:1;height:1.6em;border:1px solid var(--line)">'
        + "".join(f'<div title="{text(name)}: {1000 * seconds:.2f} ms from {1000 * start:.1f} ms" style="position:'
                  f'absolute;top:0;bottom:0;left:{100 * start / end:.3f}%;width:{100 * seconds / end:.3f}%;'
                  f'background:{colours[_kind(name)]}"></div>'
                  for name, start, seconds in _merged(rows, SHOWN_SHARE * end))
        + "</div></div>" for rank, rows in slices.items())
    return (f'<div class="legend">{legend}<span>waiting is empty; the whole is {1000 * end:.0f} ms</span></div>{bars}')


def _kind(name: str) -> str:
    return name.removesuffix(AND_OTHERS).partition(",")[0]


def _merged(rows: Sequence[Slice], shortest: float) -> list[tuple[str, float, float]]:
    """(name, start, seconds) of slices, neighbours joined until a part is at least `shortest` long."""
    parts: list[tuple[str, float, float]] = []
    held: list[Slice] = []
    for row in rows:
        held.append(row)
        last = row.start + row.seconds - held[0].start
        if last >= shortest:
            longest = max(held, key=lambda each: each.seconds)
            parts.append((longest.name if len(held) == 1 else f"{longest.name}{AND_OTHERS}", held[0].start, last))
            held = []
    if held:
        longest = max(held, key=lambda each: each.seconds)
        parts.append((longest.name, held[0].start, held[-1].start + held[-1].seconds - held[0].start))
    return parts
