"""Intervals for accuracies measured on a sample of problems."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(
    values_by_problem: Sequence[Sequence[float]], resamples: int, seed: int, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high) of all samples; the percentile interval resamples problems, not samples.

    Samples of one problem are alike, so drawing them one by one would make the interval too narrow.
    values_by_problem: one sequence of sample values per problem, none empty. Deterministic in `seed`.
    """
    if len(values_by_problem) == 0 or any(len(values) == 0 for values in values_by_problem):
        raise ValueError("bootstrap_interval needs at least one problem, and at least one sample of each")
    sums = np.array([float(np.sum(values)) for values in values_by_problem])
    counts = np.array([len(values) for values in values_by_problem], dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for index in range(resamples):
        drawn = generator.integers(len(sums), size=len(sums))
        means[index] = sums[drawn].sum() / counts[drawn].sum()
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(sums.sum() / counts.sum()), float(low), float(high)
