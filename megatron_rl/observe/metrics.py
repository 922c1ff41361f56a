"""The only place that divides: (sum, count) pairs from every rank become means, maxima become maxima."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from c3po import Max, SumCount

AllReduce = Callable[[torch.Tensor], None]


def reduce_metrics(
    sums: Mapping[str, SumCount], all_reduce: AllReduce | None, *, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Mean of each metric over all ranks: (sum of the sums) / (sum of the counts), by one all-reduce.

    all_reduce adds a float64 [2, metrics] tensor on `device` in place over the ranks; None: this process is alone.
    Every rank passes the same keys (a rank with nothing to say passes SumCount(0, 0)), in any order: they are
    sorted here. A metric whose total count is 0 was not measured and is left out.
    """
    keys = sorted(sums)
    if not keys:
        return {}
    stacked = torch.stack([_column((sums[key].sum for key in keys), device),
                           _column((sums[key].count for key in keys), device)])
    if all_reduce is not None:
        all_reduce(stacked)
    totals, counts = stacked.tolist()
    return {key: total / count for key, total, count in zip(keys, totals, counts, strict=True) if count != 0}


def reduce_maxima(
    maxima: Mapping[str, Max], all_reduce_max: AllReduce | None, *, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Largest value of each metric over all ranks, by one all-reduce with the operation MAX on float64 [metrics].

    Keys as in reduce_metrics; Max(-inf) says "nothing here", and a metric that is -inf everywhere is left out.
    """
    keys = sorted(maxima)
    if not keys:
        return {}
    values = _column((maxima[key].value for key in keys), device)
    if all_reduce_max is not None:
        all_reduce_max(values)
    return {key: value for key, value in zip(keys, values.tolist(), strict=True) if value != -math.inf}


def _column(values: Iterable[torch.Tensor | float], device: torch.device | str) -> torch.Tensor:
    """Scalars as one float64 [n] tensor: float32 stops counting tokens at 2^24."""
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device).detach() for value in values])
