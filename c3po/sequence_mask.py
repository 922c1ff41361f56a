"""Rejects whole sequences that engine and trainer disagree on, in log space: k = old / rollout per token.

Both functions return weights and the share of selected tokens that they drop. A weight is 1 at the selected tokens of a
sequence that stays, else 0, without gradient. Multiply the weights with each other and with the token weights of
correction.py. The divisor of the loss does not change: a rejected sequence counts, but without a policy gradient. Both
criteria: Liu et al., "When speed kills stability" (2025, richardli.xyz/rl-collapse).
"""

from __future__ import annotations

import math

import torch

from c3po.correction import masked_log_ratio
from c3po.diagnostics import SumCount, masked_sum_count
from c3po.sequences import sequence_mean, sequence_min

__all__ = ["geometric_mean_mask", "token_veto_mask"]


@torch.no_grad()
def geometric_mean_mask(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, loss_mask: torch.Tensor,
                        sequence_ids: torch.Tensor, *, low: float,
                        high: float) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """Keep a sequence if low <= the geometric mean of its selected tokens' k <= high.

    Returns (weights, sums): sequence_low_fraction and sequence_high_fraction, tokens of the sequences dropped on each
    side. ValueError: unless 0 < low < high; shapes or dtypes are wrong.
    """
    if not 0 < low < high:
        raise ValueError(f"sequence ratio low={low} must be positive and below high={high}")
    log_ratio = masked_log_ratio(old_logprobs, rollout_logprobs, loss_mask)
    log_mean = sequence_mean(log_ratio, loss_mask, sequence_ids)
    too_low, too_high = log_mean < math.log(low), log_mean > math.log(high)
    weights = (loss_mask & ~too_low & ~too_high).to(log_ratio.dtype)
    return weights, {"sequence_low_fraction": masked_sum_count(too_low.double(), loss_mask),
                     "sequence_high_fraction": masked_sum_count(too_high.double(), loss_mask)}


@torch.no_grad()
def token_veto_mask(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, loss_mask: torch.Tensor,
                    sequence_ids: torch.Tensor, *, min_ratio: float) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """Keep a sequence unless one of its selected tokens has k < min_ratio, too small to have been sampled.

    Returns (weights, sums): sequence_veto_fraction, tokens of the sequences dropped.
    ValueError: unless 0 < min_ratio < 1; shapes or dtypes are wrong.
    """
    if not 0 < min_ratio < 1:
        raise ValueError(f"veto min_ratio={min_ratio} must lie in (0, 1)")
    log_ratio = masked_log_ratio(old_logprobs, rollout_logprobs, loss_mask)
    vetoed = sequence_min(log_ratio, loss_mask, sequence_ids) < math.log(min_ratio)
    weights = (loss_mask & ~vetoed).to(log_ratio.dtype)
    return weights, {"sequence_veto_fraction": masked_sum_count(vetoed.double(), loss_mask)}
