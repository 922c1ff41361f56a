"""What was recorded of one rank as plain numbers: the JSON of `megatron-rl rehearse --json`, and the text's source."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from megatron_rl.config.schema import Config
from megatron_rl.model.network import Network
from megatron_rl.plan.memory import plan_stage
from megatron_rl.rehearsal.ranks import coordinates, group_name
from megatron_rl.rehearsal.recorder import Collective, Recorder
from megatron_rl.rehearsal.roofline import Rates, link, phase_seconds
from megatron_rl.rehearsal.step import PHASES, Rehearsed, Workload
from megatron_rl.rehearsal.timeline import elapsed

CENSUS_SHARE = 0.005
"""Tensors of the census take at least this share of the peak."""
PER_MICROBATCH = PHASES[:3]
"""Phases that repeat for every micro-batch; the others come once a step."""


def summary(config: Config, network: Network, workload: Workload, seen: Rehearsed, rates: Rates) -> dict[str, Any]:
    """Everything of one rank; bytes, calls and FLOPs of the rehearsed micro-batches, seconds also of a whole step.

    microbatch_seconds: by part, of the rehearsed update without the reduction of gradients, which comes once a step.
    """
    recorder, parallel = seen.recorder, config.parallel
    peaks = {phase: recorder.peaks[phase] for phase in PHASES if phase in recorder.peaks}
    fullest = max(peaks, key=lambda phase: peaks[phase].total)
    return {
        "rank": seen.here.rank, "place": dataclasses.asdict(coordinates(seen.here.rank, parallel)),
        "microbatch": {"lengths": list(workload.lengths), "rehearsed": workload.microbatches,
                       "expected_per_step": workload.per_step},
        "parameters": dataclasses.asdict(seen.parameters),
        "peak": {"phase": fullest, "bytes": peaks[fullest].total, "kinds": peaks[fullest].kinds},
        "census": {phase: [{**dataclasses.asdict(made), "bytes": size, "count": count}
                           for made, size, count in peak.largest(CENSUS_SHARE)] for phase, peak in peaks.items()},
        "phases": _phases(recorder, peaks, rates),
        "collectives": _collectives(config, recorder, rates),
        "host_reads": [{"phase": phase, "where": where, "count": count}
                       for (phase, where), count in sorted(recorder.host_reads.items()) if phase in PHASES],
        "operations": _operations(recorder),
        "curve": [list(point) for point in recorder.curve],
        "step_seconds": step_seconds(config, workload, recorder, rates),
        "microbatch_seconds": dict(phase_seconds(recorder, rates, reduces_gradients)[PHASES[2]]),
        "rates": dataclasses.asdict(rates),
        "plan": _plan(config, network, seen, workload, peaks[fullest].kinds, peaks[fullest].total),
    }


def _phases(recorder: Recorder, peaks, rates: Rates) -> dict[str, dict[str, Any]]:
    found, seconds = {}, phase_seconds(recorder, rates)
    for phase, peak in peaks.items():
        rows = [(each, count) for each, count in recorder.operations.items() if each.phase == phase]
        found[phase] = {
            "peak_bytes": peak.total, "kinds": peak.kinds, "kernels": sum(count for _, count in rows),
            "flops": sum(each.flops * count for each, count in rows),
            "traffic_bytes": sum(each.bytes * count for each, count in rows),
            "host_reads": sum(count for (where, _), count in recorder.host_reads.items() if where == phase),
            "seconds": dict(seconds.get(phase, {})),
            "elapsed": elapsed([event for event in recorder.events if event.phase == phase], rates)}
    return found


def _collectives(config: Config, recorder: Recorder, rates: Rates) -> list[dict[str, Any]]:
    """By phase, operation and group: calls and bytes; where: the lines that asked, with their calls."""
    found: dict[tuple, dict[str, Any]] = {}
    for call, count in sorted(recorder.collectives.items()):
        if call.phase not in PHASES:
            continue
        name = group_name(call.ranks, config.parallel)
        row = found.setdefault((call.phase, call.operation, call.ranks), {
            "phase": call.phase, "operation": call.operation, "group": name, "size": len(call.ranks),
            "link": link(call.ranks, rates), "calls": 0, "bytes": 0, "where": Counter()})
        row["calls"] += count
        row["bytes"] += count * call.bytes
        row["where"][call.where] += count
    return list(found.values())


def _operations(recorder: Recorder) -> list[dict[str, Any]]:
    """By phase and name: calls, FLOPs and bytes, the most bytes first."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for each, count in recorder.operations.items():
        if each.phase in PHASES:
            row = found.setdefault((each.phase, each.name), Counter())
            row.update(calls=count, flops=count * each.flops, bytes=count * each.bytes)
    return [{"phase": phase, "name": name, **row}
            for (phase, name), row in sorted(found.items(), key=lambda item: (-item[1]["bytes"], item[0]))]


def step_seconds(config: Config, workload: Workload, recorder: Recorder, rates: Rates) -> dict[str, float]:
    """Seconds of one whole optimiser step at this rank's pace, with what its code overlaps (timeline.py).

    scoring: both passes; update: both with the pipeline's bubble. once: what comes once a step, the reduction of the
    gradients among it as far as the last micro-batch does not hide it.
    """
    parallel, expected = config.parallel, workload.per_step
    chunks = expected * (parallel.vpp or 1)
    factor = expected / workload.microbatches * (1 + (parallel.pp - 1) / chunks)
    of = {phase: [event for event in recorder.events if event.phase == phase] for phase in PHASES}
    each = {phase: elapsed(events, rates, reduces_gradients) for phase, events in of.items()}
    return {"scoring": factor * (each[PHASES[0]] + each[PHASES[1]]), "update": factor * each[PHASES[2]],
            "once": elapsed(of[PHASES[2]], rates) - each[PHASES[2]] + elapsed(of[PHASES[3]], rates)
            + elapsed(of[PHASES[4]], rates)}


def reduces_gradients(call: Collective) -> bool:
    """Megatron's DistributedDataParallel asks for these in the last micro-batch alone (TrainStep's no_sync)."""
    return call.phase == PHASES[2] and call.where.startswith("megatron/core/distributed/")


def _plan(config: Config, network: Network, seen: Rehearsed, workload: Workload, kinds: dict[str, int],
          total: int) -> dict[str, dict[str, int]]:
    """Kind -> what `megatron-rl plan` says of this rank's stage and what was rehearsed, in bytes."""
    plan = plan_stage(network, config, seen.here.pp_rank, workload.microbatches)
    passing = plan.activations + max(plan.layer, plan.logits)
    rows = {"weights": (plan.weights, kinds.get("weights", 0)),
            "gradients": (plan.gradients, kinds.get("gradients", 0)),
            "optimiser": (plan.optimizer, kinds.get("optimiser", 0)),
            "reference": (plan.reference, kinds.get("reference", 0)),
            "activations": (passing, kinds.get("activations", 0)), "peak": (plan.stays + passing, total)}
    return {kind: {"plan": planned, "rehearsed": found} for kind, (planned, found) in rows.items()}
