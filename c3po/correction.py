"""Token weights against the mismatch between the engine that sampled and the trainer that learns, in log space.

Each token has three log-probabilities: rollout (the engine's, when it sampled), old (the trainer's, before the first
update on this batch), new (now, with gradient; only loss.py sees it). The weight here is old / rollout.
sequence_mask.py rejects whole sequences. All tensors share one shape and masks are bool. Weights are float32 (float64
in, float64 out), carry no gradient and are 0 outside the mask. A masked value never reaches exp().
"""

from __future__ import annotations

import math

import torch

from c3po.diagnostics import Max, SumCount, as_math_dtype, k3, masked_sum_count

__all__ = ["icepop_weights", "kpop_weights", "masked_log_ratio", "mismatch_diagnostics", "tis_weights", "weight_sums"]

SMALLEST_COMPLEMENT = 2.0 ** -24
"""Below this 1 - p, a float32 log-probability is 0: two of them cannot be told apart."""


@torch.no_grad()
def tis_weights(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, loss_mask: torch.Tensor, *,
                cap: float) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """Truncated importance sampling: min(old / rollout, cap).

    Returns (weights, sums): the keys of weight_sums and tis_capped_fraction, tokens above the cap.
    ValueError: cap not positive, shapes differ, mask not bool.
    """
    if not cap > 0:
        raise ValueError(f"tis cap={cap} must be positive")
    log_ratio = masked_log_ratio(old_logprobs, rollout_logprobs, loss_mask)
    weights = log_ratio.clamp(max=math.log(cap)).exp() * loss_mask
    sums = weight_sums(weights, loss_mask)
    sums["tis_capped_fraction"] = masked_sum_count((log_ratio > math.log(cap)).double(), loss_mask)
    return weights, sums


@torch.no_grad()
def icepop_weights(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, loss_mask: torch.Tensor, *,
                   low: float, high: float) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """IcePop (Ring-1T, arXiv 2510.18855): k = old / rollout if low <= k <= high, else 0.

    Returns (weights, sums): the keys of weight_sums, icepop_low_fraction and icepop_high_fraction, tokens
    dropped on each side. ValueError: unless 0 < low < high; shapes differ, mask not bool.
    """
    if not 0 < low < high:
        raise ValueError(f"icepop low={low} must be positive and below high={high}")
    log_ratio = masked_log_ratio(old_logprobs, rollout_logprobs, loss_mask)
    too_low, too_high = log_ratio < math.log(low), log_ratio > math.log(high)
    kept = loss_mask & ~too_low & ~too_high
    weights = torch.where(kept, log_ratio, torch.zeros_like(log_ratio)).exp() * kept
    sums = weight_sums(weights, loss_mask)
    sums["icepop_low_fraction"] = masked_sum_count(too_low.double(), loss_mask)
    sums["icepop_high_fraction"] = masked_sum_count(too_high.double(), loss_mask)
    return weights, sums


@torch.no_grad()
def kpop_weights(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, loss_mask: torch.Tensor, *,
                 max_kl: float) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """KPop (Guo et al., Ant Group, ringtech.notion.site/kpop): k = old / rollout if both agree on the token, else 0.

    Agreement is measured on two events, this token or any other. For p = old and q = rollout, both
    D(p || q) = p ln(p/q) + (1-p) ln((1-p)/(1-q)) and D(q || p) must be at most max_kl (nats). In terms of k that is
    wide for rare tokens and narrow for likely ones; k itself is not bounded.
    Returns (weights, sums): the keys of weight_sums, and kpop_fraction, tokens dropped.
    ValueError: max_kl not positive; shapes differ, mask not bool.
    """
    if not max_kl > 0:
        raise ValueError(f"kpop max_kl={max_kl} must be positive")
    log_ratio = masked_log_ratio(old_logprobs, rollout_logprobs, loss_mask)
    old, rollout = (torch.where(loss_mask, as_math_dtype(x), torch.zeros_like(log_ratio))
                    for x in (old_logprobs, rollout_logprobs))
    complement_old, complement_rollout = ((-torch.expm1(x)).clamp(min=SMALLEST_COMPLEMENT) for x in (old, rollout))
    log_complement_ratio = complement_old.log() - complement_rollout.log()
    forward = old.exp() * log_ratio + complement_old * log_complement_ratio
    backward = -rollout.exp() * log_ratio - complement_rollout * log_complement_ratio
    dropped = torch.maximum(forward, backward) > max_kl
    kept = loss_mask & ~dropped
    weights = torch.where(kept, log_ratio, torch.zeros_like(log_ratio)).exp() * kept
    return weights, {**weight_sums(weights, loss_mask),
                     "kpop_fraction": masked_sum_count(dropped.double(), loss_mask)}


@torch.no_grad()
def mismatch_diagnostics(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor,
                         loss_mask: torch.Tensor) -> tuple[dict[str, SumCount], dict[str, Max]]:
    """How far trainer and engine disagree on the sampled tokens: (sums, maxima).

    sums: mismatch_kl, the k3 estimate of KL(rollout || old) in nats; mismatch_abs, |old - rollout|.
    maxima: mismatch_abs, the largest |old - rollout|, 0 if the mask is empty.
    ValueError: shapes differ, mask not bool.
    """
    log_ratio = masked_log_ratio(old_logprobs, rollout_logprobs, loss_mask)
    gap = log_ratio.abs()
    sums = {"mismatch_kl": masked_sum_count(k3(log_ratio), loss_mask),
            "mismatch_abs": masked_sum_count(gap, loss_mask)}
    largest = gap.max() if gap.numel() else gap.new_zeros(())
    return sums, {"mismatch_abs": Max(largest)}


def masked_log_ratio(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor,
                     loss_mask: torch.Tensor) -> torch.Tensor:
    """log(old / rollout), 0 outside the mask. ValueError: shapes differ, mask not bool."""
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be bool, not {loss_mask.dtype}")
    if not old_logprobs.shape == rollout_logprobs.shape == loss_mask.shape:
        raise ValueError(f"old_logprobs {tuple(old_logprobs.shape)}, rollout_logprobs {tuple(rollout_logprobs.shape)} "
                         f"and loss_mask {tuple(loss_mask.shape)} must have one shape")
    difference = as_math_dtype(old_logprobs) - as_math_dtype(rollout_logprobs)
    return torch.where(loss_mask, difference, torch.zeros_like(difference))


def weight_sums(weights: torch.Tensor, loss_mask: torch.Tensor) -> dict[str, SumCount]:
    """mismatch_weight and mismatch_weight_squared, sums over the weights as applied.

    The effective sample size is sum(w)^2 / sum(w^2), that is count * mean(w)^2 / mean(w^2). It does not add up over
    slices, so slices report these two sums.
    """
    return {"mismatch_weight": masked_sum_count(weights, loss_mask),
            "mismatch_weight_squared": masked_sum_count(weights.square(), loss_mask)}
