"""Finished runs as numbers: one per run and column, and what they say about each statement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct
from scipy.stats import t as student_t

from megatron_rl.ablations.driver import Plan
from megatron_rl.ablations.spec import Ablation, Statement, Take
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.plots import series_of
from megatron_rl.observe.sinks import EVALUATIONS, METRICS

HELD_OUT = "held_out/"
MIN_SEEDS = 3
POWER = 0.8
RULE = ("For each seed the difference of the two arms (or of one arm from zero); its mean over the seeds with the 95% "
        "interval of Student's t. The whole interval on the claimed side of zero: supports; on the other side: "
        f"contradicts; an interval with zero in it, or fewer than {MIN_SEEDS} seeds: cannot tell. Could detect: the "
        f"true difference that this rule finds in {POWER:.0%} of such experiments, if differences spread as these do.")

Table = Mapping[str, Mapping[str, Sequence[float]]]
"""arm -> column label -> one value per finished seed, in the order of the seeds."""


@dataclass(frozen=True)
class Verdict:
    """What the data say about a statement. difference: arm - than, mean over seeds, with its 95% interval.

    detectable: as `detectable` says, for the seeds that the plan has, finished or not.
    """

    statement: Statement
    verdict: str
    differences: tuple[float, ...]
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    detectable: float = math.nan


def series(folder: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a metric of a run, float64 [n]; held_out/<name> is <name> of eval.jsonl."""
    held_out = metric.startswith(HELD_OUT)
    rows = read_jsonl(folder / (EVALUATIONS if held_out else METRICS))
    return series_of(rows, metric.removeprefix(HELD_OUT))


def take(values: np.ndarray, how: Take) -> float:
    """One number of a run's values [n], NaN without values.

    end: mean over the last tenth. cv: standard deviation / mean. jitter: root mean square of the step-to-step changes
    / sqrt(2) / mean, which is the cv of a series without trend and, unlike it, leaves a trend out.
    """
    if not len(values):
        return math.nan
    if how == "gain":
        return float(values[-1] - values[0])
    if how == "end":
        return float(values[-max(1, len(values) // 10):].mean())
    if how in ("cv", "jitter"):
        spread = values.std() if how == "cv" else math.sqrt(np.square(np.diff(values)).mean() / 2)
        return float(spread / values.mean()) if len(values) > 1 and values.mean() else math.nan
    return {"first": lambda: float(values[0]), "last": lambda: float(values[-1]),
            "mean": lambda: float(values.mean()), "sum": lambda: float(values.sum())}[how]()


def tabulate(ablation: Ablation, todo: Plan, seeds: Sequence[int]) -> Table:
    """Every column of every arm at `seeds`, whose runs are all finished."""
    return {arm: {column.label: [take(series(run.folder, column.metric)[1], column.take)
                                 for run in todo.runs if run.arm == arm and run.seed in seeds]
                  for column in ablation.columns}
            for arm in dict.fromkeys(run.arm for run in todo.runs)}


def whole_seeds(todo: Plan) -> list[int]:
    """The seeds whose runs are finished in every arm: only these are compared."""
    seeds = dict.fromkeys(run.seed for run in todo.runs)
    return [seed for seed in seeds if all(run.finished() for run in todo.runs if run.seed == seed)]


def judge(statement: Statement, table: Table, seeds: int | None = None) -> Verdict | None:
    """RULE on one statement; None where the scale lacks one of its arms. seeds: of the plan; None: those in `table`."""
    if not {statement.arm, statement.than} - {None} <= table.keys():
        return None
    values = table[statement.arm][statement.column]
    others = [0.0] * len(values) if statement.than is None else table[statement.than][statement.column]
    differences = tuple(ours - theirs for ours, theirs in zip(values, others, strict=True))
    number = len(differences)
    mean, spread = mean_and_spread(differences)
    could = detectable(spread, seeds or number)
    if number < MIN_SEEDS or not all(map(math.isfinite, differences)):
        return Verdict(statement, "cannot tell", differences, mean, detectable=could)
    half = float(student_t.ppf(0.975, number - 1)) * spread / math.sqrt(number)
    low, high = mean - half, mean + half
    claimed_sign = 1 if statement.direction == "higher" else -1
    verdict = "cannot tell" if low <= 0 <= high else "supports" if mean * claimed_sign > 0 else "contradicts"
    return Verdict(statement, verdict, differences, mean, low, high, could)


def detectable(spread: float, seeds: int) -> float:
    """The true mean difference that RULE finds with probability POWER, if `spread` is known.

    spread: standard deviation over seeds of the paired differences. NaN below MIN_SEEDS seeds. Power of the two-sided
    t test (Cohen 1988, ch. 2): under a true difference d the statistic has the noncentral t law with noncentrality
    d sqrt(seeds) / spread.
    """
    if seeds < MIN_SEEDS:
        return math.nan
    critical = student_t.ppf(0.975, seeds - 1)
    shift = brentq(lambda shift: nct.sf(critical, seeds - 1, shift) - POWER, 0.0, 20.0)
    return float(shift) * spread / math.sqrt(seeds)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; NaN where nothing was measured, the latter also for one seed."""
    return (statistics.fmean(values) if values else math.nan,
            float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)
