"""A rank's summary as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_rl.config.schema import Config
from megatron_rl.plan.report import layout
from megatron_rl.rehearsal.rates import RatesFile
from megatron_rl.rehearsal.step import PHASES

GB = 1e9
CENSUS_ROWS, COLLECTIVE_ROWS, READ_ROWS, OPERATION_ROWS = 12, 24, 12, 10
PHASE = max(map(len, PHASES)) + 2
"""Width of the column of phases."""
PARTS = ("matrix", "memory", "host", "nvlink", "network")
LIMITS = ("not counted: the allocator's fragmentation, NCCL's buffers, the CUDA context, "
          "what overlapping costs; seconds are a roofline over stated rates")


def rank_text(config: Config, found: dict[str, Any], rates: RatesFile) -> str:
    """found: summary.summary."""
    return "\n".join([*_head(config, found), "", *_memory(found), "", *_census(found), "", *_phases(found), "",
                      *_collectives(found), "", *_host_reads(found), "", *_operations(found), "",
                      *_seconds(found, rates), "", LIMITS])


def _head(config: Config, found: dict[str, Any]) -> list[str]:
    parallel, batch, parameters = config.parallel, found["microbatch"], found["parameters"]
    place = ", ".join(f"{name} {index}" for name, index in found["place"].items())
    dense = parameters["split"] + parameters["whole"]
    return [
        f"rank       {found['rank']} of {parallel.world_size}: {layout(parallel)}, recompute={config.model.recompute}",
        f"place      {place}",
        f"parameters {dense:,} dense and {parameters['experts']:,} expert",
        f"rehearsed  {batch['rehearsed']} micro-batch{'es' * (batch['rehearsed'] > 1)} of "
        f"{len(batch['lengths'])} sequences, {sum(batch['lengths']):,} positions over {parallel.cp} context-parallel "
        f"rank{'s' * (parallel.cp > 1)}; a step has about {batch['expected_per_step']:.4g}",
        f"lengths    {found['sources']['lengths']}",
        f"experts    {found['sources']['experts']}"]


def _memory(found: dict[str, Any]) -> list[str]:
    rows = [f"peak       {found['peak']['bytes'] / GB:.2f} GB, in phase: {found['peak']['phase']}",
            f"{'GB by kind':<26}{'rehearsed':>10}{'plan':>10}{'difference':>12}"]
    for kind, sizes in found["plan"].items():
        if sizes["plan"] or sizes["rehearsed"]:
            apart = f"{sizes['rehearsed'] / sizes['plan'] - 1:+.1%}" if sizes["plan"] else ""
            rows.append(f"  {kind:<24}{sizes['rehearsed'] / GB:>10.3f}{sizes['plan'] / GB:>10.3f}{apart:>12}")
    return rows


def _census(found: dict[str, Any]) -> list[str]:
    rows = ["what is alive at the peak: GB, how many, what, made where"]
    for each in found["census"][found["peak"]["phase"]][:CENSUS_ROWS]:
        shape = "x".join(map(str, each["shape"]))
        rows.append(f"  {each['bytes'] / GB:8.3f} {each['count']:>5}  {each['kind']}: {each['dtype']} [{shape}] "
                    f"{each['operation'].removeprefix('aten.')}, {each['where']}")
    return rows


def _phases(found: dict[str, Any]) -> list[str]:
    rows = [f"{'phase':<{PHASE + 2}}{'peak GB':>9}{'TFLOP':>10}{'TB moved':>10}{'kernels':>9}{'host reads':>12}"
            f"{'seconds':>9}"]
    for phase, each in found["phases"].items():
        rows.append(f"  {phase:<{PHASE}}{each['peak_bytes'] / GB:>9.2f}{each['flops'] / 1e12:>10.2f}"
                    f"{each['traffic_bytes'] / 1e12:>10.3f}{each['kernels']:>9,}{each['host_reads']:>12}"
                    f"{each['elapsed']:>9.3f}")
    return rows


def _collectives(found: dict[str, Any]) -> list[str]:
    rows = [f"{'collectives of phase':<{PHASE + 2}}{'operation':<16}{'group':<20}{'ranks':>6}  {'link':<8}{'calls':>6}"
            f"{'GB':>9}"]
    for each in found["collectives"][:COLLECTIVE_ROWS]:
        rows.append(f"  {each['phase']:<{PHASE}}{each['operation']:<16}{each['group']:<20}{each['size']:>6}  "
                    f"{each['link']:<8}{each['calls']:>6}{each['bytes'] / GB:>9.3f}")
    return rows + _more(found["collectives"], COLLECTIVE_ROWS)


def _host_reads(found: dict[str, Any]) -> list[str]:
    reads = sorted(found["host_reads"], key=lambda each: -each["count"])
    rows = ["the host waits for the device: how often, phase, line"]
    rows += [f"  {each['count']:>6}  {each['phase']}: {each['where']}" for each in reads[:READ_ROWS]]
    return rows + _more(reads, READ_ROWS)


def _operations(found: dict[str, Any]) -> list[str]:
    rows = [f"{'operations that move most':<{PHASE + 2}}{'name':<46}{'calls':>7}{'TB':>8}{'TFLOP':>9}"]
    for each in found["operations"][:OPERATION_ROWS]:
        rows.append(f"  {each['phase']:<{PHASE}}{each['name']:<46}{each['calls']:>7,}{each['bytes'] / 1e12:>8.3f}"
                    f"{each['flops'] / 1e12:>9.2f}")
    return rows + _more(found["operations"], OPERATION_ROWS)


def _seconds(found: dict[str, Any], rates: RatesFile) -> list[str]:
    rows = [f"seconds at the rates: {rates.stated()}",
            f"{'phase, as rehearsed':<29}{''.join(f'{part:>9}' for part in PARTS)}{'together':>10}"]
    for phase, each in found["phases"].items():
        parts = "".join(f"{each['seconds'].get(part, 0.0):>9.3f}" for part in PARTS)
        rows.append(f"  {phase:<{PHASE}}{parts}{each['elapsed']:>10.3f}")
    step = found["step_seconds"]
    return [*rows, f"one optimiser step at this rank's pace: {sum(step.values()):.1f} s: "
                   f"scoring {step['scoring']:.1f}, update {step['update']:.1f}, once a step {step['once']:.1f}"]


def _more(rows: list, shown: int) -> list[str]:
    return [f"  and {len(rows) - shown} more (--json FILE has all)"] if len(rows) > shown else []


def stages_text(config: Config, found: list[dict[str, Any]], waits: dict[int, float]) -> str:
    """The distinct ranks side by side, and what the slowest of them does to the step.

    waits: rank -> the share of the rehearsed update in which it waits for other stages (timeline.py).
    """
    rows = [f"{'rank':>6}{'stage':>7}{'cp':>4}{'peak GB':>9}{'TFLOP':>9}{'TB moved':>10}{'update s':>10}"
            f"{'waits':>8}{'step s':>9}"]
    for each in found:
        update = each["phases"]["update"]
        rows.append(f"{each['rank']:>6}{each['place']['pp']:>7}{each['place']['cp']:>4}"
                    f"{each['peak']['bytes'] / GB:>9.2f}{update['flops'] / 1e12:>9.1f}"
                    f"{update['traffic_bytes'] / 1e12:>10.3f}"
                    f"{update['elapsed']:>10.3f}{waits[each['rank']]:>8.0%}"
                    f"{sum(each['step_seconds'].values()):>9.1f}")
    paces = [each["phases"]["update"]["elapsed"] for each in found]
    slowest = max(range(len(found)), key=paces.__getitem__)
    mean = sum(paces) / len(paces)
    return "\n".join([
        f"{layout(config.parallel)}: one rank of each distinct kind", *rows,
        f"slowest    rank {found[slowest]['rank']}, {paces[slowest] / mean:.2f} x the mean of the update; the step "
        f"goes at its pace: {sum(found[slowest]['step_seconds'].values()):.1f} s"])


def layouts_text(found: list[dict[str, Any]], rates: RatesFile) -> str:
    """Layouts by the seconds of a step, at the pace of the slower of their rehearsed ranks, and what takes the seconds
    of an update but for the reduction of gradients, which comes once a step.

    found: of each layout its name, whether it was asked about, and the summaries of its ranks.
    """
    rows = [f"{'layout (* asked about)':<46}{'peak GB':>9}{'step s':>8}{'scoring':>9}{'update':>8}  where"]

    def slower(each: dict[str, Any]) -> dict[str, Any]:
        return max(each["ranks"], key=lambda rank: sum(rank["step_seconds"].values()))

    for each in sorted(found, key=lambda one: sum(slower(one)["step_seconds"].values())):
        rank, peak = slower(each), max(one["peak"]["bytes"] for one in each["ranks"])
        step, parts = rank["step_seconds"], rank["microbatch_seconds"]
        spent = ", ".join(f"{name} {value / sum(parts.values()):.0%}" for name, value in sorted(parts.items()))
        rows.append(f"{each['layout'] + ' *' * each['asked']:<46}{peak / GB:>9.2f}{sum(step.values()):>8.1f}"
                    f"{step['scoring']:>9.1f}{step['update']:>8.1f}  {spent}")
    return "\n".join([*rows, f"assumed: {rates.stated()}"])


def collectors_text(rows: Sequence[dict[str, Any]], assumed: Sequence[str]) -> str:
    """rows: whole_step.whole_steps."""
    title = (f"{'collector':<10}{'engines':>14}{'GPUs':>6}{'step s':>8}{'rollout':>9}{'train':>7}"
             f"{'publish':>9}{'engines busy':>14}{'dropped':>9}{'stale':>7}{'steps/day':>11}{'Gtok/day':>10}"
             f"{'tok/s/GPU':>11}{'its CV':>8}")
    found = [f"{row['collector']:<10}{row['engines']:>5} {'on ranks' if row['colocated'] else 'apart':<8}"
             f"{row['gpus']:>6}{row['seconds']:>8.1f}{row['rollout']:>9.1f}{row['train']:>7.1f}{row['publish']:>9.1f}"
             f"{row['engine_busy']:>14.0%}{row['dropped'] / max(1.0, row['generated']):>9.1%}{row['staleness']:>7.2f}"
             f"{row['steps_per_day']:>11,.0f}{row['tokens_per_day'] / GB:>10.2f}{row['tokens_per_s_per_gpu']:>11,.0f}"
             f"{row['tokens_per_s_cv']:>8.1%}"
             for row in rows]
    return "\n".join(["whole steps, on a simulated clock: means of the measured steps", title, *found,
                      *(f"assumed: {each}" for each in assumed)])
