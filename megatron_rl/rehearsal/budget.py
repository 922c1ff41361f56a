"""The most that a step may hold, send and wait for: figures to keep in a file, and what has grown beyond them.

A forgotten tensor, a doubled collective or a new read by the host is more than the file allows and is named with the
line that made it. Less than the file allows passes; then the file should be written anew.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

CENSUS_SHARE = 0.01
_LINE = re.compile(r":\d+ ")


def figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of summary.summary that the budget compares.

    By phase: peak bytes and host reads. By phase, operation and group: [calls, bytes]. where, census: what the messages
    compare with; file and function without the line, which moves with every edit.
    """
    phases = found["phases"]
    return {
        "peak_bytes": {phase: each["peak_bytes"] for phase, each in phases.items()},
        "host_reads": {phase: each["host_reads"] for phase, each in phases.items()},
        "collectives": {_call(each): [each["calls"], each["bytes"]] for each in found["collectives"]},
        "where": {kind: dict(sorted(counts.items())) for kind, counts in
                  (("host_reads", _reads(found)), ("collectives", _callers(found)))},
        "census": {phase: {_tensor(each): each["bytes"] for each in rows
                           if each["bytes"] >= CENSUS_SHARE * phases[phase]["peak_bytes"]}
                   for phase, rows in found["census"].items()},
    }


def grown(allowed: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One sentence for each figure of `found` (a summary) above `allowed` (figures of an earlier one)."""
    now, messages = figures(found), []
    for phase, size in now["peak_bytes"].items():
        if size > (limit := allowed["peak_bytes"].get(phase, 0)):
            before = allowed["census"].get(phase, {})
            more = [(each["bytes"] - before.get(_tensor(each), 0), each) for each in found["census"][phase]]
            lines = [f"{extra / 1e6:,.3f} MB more of {each['count']} {each['dtype']} {each['shape']} "
                     f"{each['operation']}, {each['where']}" for extra, each in sorted(more, key=lambda row: -row[0])
                     if extra > 0]
            messages.append(_message(f"{phase}: peak of {size:,} bytes, {size - limit:,} above the budget", lines))
    for call, (calls, size) in now["collectives"].items():
        limit_calls, limit_bytes = allowed["collectives"].get(call, (0, 0))
        if calls > limit_calls or size > limit_bytes:
            lines = _new(allowed, found["collectives"], "collectives", lambda row, call=call: _call(row) == call)
            messages.append(_message(f"{call}: {calls} calls and {size:,} bytes, the budget is {limit_calls} and "
                                     f"{limit_bytes:,}", lines))
    for phase, reads in now["host_reads"].items():
        if reads > (limit := allowed["host_reads"].get(phase, 0)):
            before = allowed["where"]["host_reads"]
            lines = [f"{each['count']} at {each['where']}" for each in found["host_reads"] if each["phase"] == phase
                     and _reads(found)[_read(each)] > before.get(_read(each), 0)]
            messages.append(_message(f"{phase}: the host waits {reads} times, the budget is {limit}", lines))
    return messages


def _message(what: str, lines: list[str]) -> str:
    return "\n".join([what, *(f"    {line}" for line in lines[:5])])


def _new(allowed, rows, kind: str, wanted) -> list[str]:
    before, lines = allowed["where"][kind], []
    for row in filter(wanted, rows):
        for line, calls in row["where"].items():
            if calls > before.get(f"{_call(row)}: {_place(line)}", 0):
                lines.append(f"{calls} at {line}")
    return lines


def _place(line: str) -> str:
    return _LINE.sub(" ", line)


def _call(row: Mapping[str, Any]) -> str:
    return f"{row['phase']}: {row['operation']} over {row['group']}"


def _read(row: Mapping[str, Any]) -> str:
    return f"{row['phase']}: {_place(row['where'])}"


def _tensor(row: Mapping[str, Any]) -> str:
    return f"{row['kind']} {row['dtype']} {list(row['shape'])} {row['operation']} {_place(row['where'])}"


def _reads(found: Mapping[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row in found["host_reads"]:
        counts[_read(row)] += row["count"]
    return counts


def _callers(found: Mapping[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row in found["collectives"]:
        for line, calls in row["where"].items():
            counts[f"{_call(row)}: {_place(line)}"] += calls
    return counts
