"""Measurements in forms that slices of a step can combine: sums with counts, and maxima.

Nothing here divides, because a mean of means is wrong if slices differ in size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Max", "SumCount", "as_math_dtype", "k3", "masked_sum_count"]


@dataclass(frozen=True)
class SumCount:
    """A total and the number of things it is over. `+` adds both; only observe/metrics.py divides.

    sum, count: 0-dim tensors (float64 if this package made them) or plain numbers. count 0: not measured.
    """

    sum: torch.Tensor | float
    count: torch.Tensor | float

    def __add__(self, other: SumCount) -> SumCount:
        return SumCount(self.sum + other.sum, self.count + other.count)


@dataclass(frozen=True)
class Max:
    """The largest value so far, 0-dim tensor or plain number. `merge` keeps the larger, and NaN. It does not add.

    Tensors stay on their device: the host does not wait for them.
    """

    value: torch.Tensor | float

    def merge(self, other: Max) -> Max:
        if isinstance(self.value, torch.Tensor) and isinstance(other.value, torch.Tensor):
            return Max(torch.maximum(self.value, other.value))
        is_nan = self.value != self.value
        return self if is_nan or self.value >= other.value else other


@torch.no_grad()
def masked_sum_count(values: torch.Tensor, mask: torch.Tensor) -> SumCount:
    """The sum of values where mask (bool, same shape) is True, and the number of such places, detached, in float64.

    float64, because float32 stops counting at 2^24 tokens. NaN outside the mask does not enter the sum.
    """
    kept = torch.where(mask, values, torch.zeros_like(values))
    return SumCount(kept.sum(dtype=torch.float64), mask.sum().double())


def as_math_dtype(values: torch.Tensor) -> torch.Tensor:
    """float32 for softmax-scale arithmetic, or float64 if the caller already works in it."""
    return values if values.dtype == torch.float64 else values.float()


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 = r - 1 - log r >= 0 (joschu.net/blog/kl-approx.html) for log_ratio = log(q/p), samples from p.

    Estimates KL(p || q). expm1 keeps the small values that matter: r - 1 cancels for r near 1.
    """
    return torch.expm1(log_ratio) - log_ratio
