"""Correction for the gap between the engine that sampled and the trainer that learns, in log space.

Three log-probabilities per token: rollout (the engine's, when it sampled), old (the trainer's, before the
first update on this batch), new (now, with gradient; only loss.py sees it). The weight here is old / rollout.
All tensors share one shape; masks are bool; weights are float32 (float64 in, float64 out), carry no
gradient and are 0 outside the mask. A masked value never reaches exp().
"""

from __future__ import annotations

import math

import torch

from c3po.diagnostics import Max, SumCount, as_math_dtype, k3, masked_sum_count

__all__ = ["icepop_weights", "mismatch_diagnostics", "tis_weights"]


@torch.no_grad()
def tis_weights(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, loss_mask: torch.Tensor, *,
                cap: float) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """Truncated importance sampling: min(old / rollout, cap).

    Returns (weights, sums): the keys of _weight_sums and tis_capped_fraction, tokens above the cap.
    ValueError: cap not positive, shapes differ, mask not bool.
    """
    if not cap > 0:
        raise ValueError(f"tis cap={cap} must be positive")
    log_ratio = _masked_log_ratio(old_logprobs, rollout_logprobs, loss_mask)
    weights = log_ratio.clamp(max=math.log(cap)).exp() * loss_mask
    sums = _weight_sums(weights, loss_mask)
    sums["tis_capped_fraction"] = masked_sum_count((log_ratio > math.log(cap)).double(), loss_mask)
    return weights, sums


@torch.no_grad()
def icepop_weights(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, loss_mask: torch.Tensor, *,
                   low: float, high: float) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """IcePop (Ring-1T, arXiv 2510.18855): k = old / rollout if low <= k <= high, else 0.

    Returns (weights, sums): the keys of _weight_sums, icepop_low_fraction and icepop_high_fraction, tokens
    dropped on each side. ValueError: unless 0 < low < high; shapes differ, mask not bool.
    """
    if not 0 < low < high:
        raise ValueError(f"icepop low={low} must be positive and below high={high}")
    log_ratio = _masked_log_ratio(old_logprobs, rollout_logprobs, loss_mask)
    too_low, too_high = log_ratio < math.log(low), log_ratio > math.log(high)
    kept = loss_mask & ~too_low & ~too_high
    weights = torch.where(kept, log_ratio, torch.zeros_like(log_ratio)).exp() * kept
    sums = _weight_sums(weights, loss_mask)
    sums["icepop_low_fraction"] = masked_sum_count(too_low.double(), loss_mask)
    sums["icepop_high_fraction"] = masked_sum_count(too_high.double(), loss_mask)
    return weights, sums


@torch.no_grad()
def mismatch_diagnostics(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor,
                         loss_mask: torch.Tensor) -> tuple[dict[str, SumCount], dict[str, Max]]:
    """How far trainer and engine disagree on the sampled tokens: (sums, maxima).

    sums: mismatch_kl, the k3 estimate of KL(rollout || old) in nats; mismatch_abs, |old - rollout|.
    maxima: mismatch_abs, the largest |old - rollout|, 0 if the mask is empty.
    ValueError: shapes differ, mask not bool.
    """
    log_ratio = _masked_log_ratio(old_logprobs, rollout_logprobs, loss_mask)
    gap = log_ratio.abs()
    sums = {"mismatch_kl": masked_sum_count(k3(log_ratio), loss_mask),
            "mismatch_abs": masked_sum_count(gap, loss_mask)}
    largest = gap.max() if gap.numel() else gap.new_zeros(())
    return sums, {"mismatch_abs": Max(largest)}


def _masked_log_ratio(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor,
                      loss_mask: torch.Tensor) -> torch.Tensor:
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be bool, not {loss_mask.dtype}")
    if not old_logprobs.shape == rollout_logprobs.shape == loss_mask.shape:
        raise ValueError(f"old_logprobs {tuple(old_logprobs.shape)}, rollout_logprobs {tuple(rollout_logprobs.shape)} "
                         f"and loss_mask {tuple(loss_mask.shape)} must have one shape")
    difference = as_math_dtype(old_logprobs) - as_math_dtype(rollout_logprobs)
    return torch.where(loss_mask, difference, torch.zeros_like(difference))


def _weight_sums(weights: torch.Tensor, loss_mask: torch.Tensor) -> dict[str, SumCount]:
    """mismatch_weight and mismatch_weight_squared, of the weights as applied.

    Effective sample size: sum(w)^2 / sum(w^2), that is count * mean(w)^2 / mean(w^2). It is not a sum, so
    its two sums are what slices report.
    """
    return {"mismatch_weight": masked_sum_count(weights, loss_mask),
            "mismatch_weight_squared": masked_sum_count(weights.square(), loss_mask)}
