"""Which sequence each token belongs to, and reductions over a sequence whose result every token of it gets.

One representation serves both layouts: sequence_ids, an integer tensor of the shape of the per-token tensors. Tokens
with the same number form a sequence; numbers count from 0 and should be dense. A reduction only sees one rank's
tensor, so a sequence that is spread over ranks (context parallelism) or over slices must not be reduced here.
"""

from __future__ import annotations

import torch

__all__ = ["packed_sequence_ids", "padded_sequence_ids", "sequence_mean", "sequence_min"]


def packed_sequence_ids(cu_seqlens: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
    """int64 [T] for sequences laid end to end: cu_seqlens [S+1] = (0, 3, 5) gives 0 0 0 1 1.

    num_tokens: T, if the caller knows it; None: it is read from the device.
    """
    lengths_S = cu_seqlens.diff()
    return torch.arange(lengths_S.numel(), device=cu_seqlens.device).repeat_interleave(
        lengths_S, output_size=num_tokens)


def padded_sequence_ids(per_token: torch.Tensor) -> torch.Tensor:
    """int64 [B, L] for one sequence per row of per_token [B, L]: the row's number."""
    rows = torch.arange(per_token.shape[0], device=per_token.device)
    return rows[:, None].expand_as(per_token)


def sequence_mean(values: torch.Tensor, mask: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    """Mean of values over the masked-in tokens of its sequence, at each token; 0 in a sequence that has none.

    It adds in float64. A mean over 10^4 tokens then keeps the digits that GSPO clips at, and does not depend on the
    order in which a GPU adds. A masked value, even NaN, does not enter. ValueError: as check_sequence_ids.
    """
    check_sequence_ids(sequence_ids, values)
    ids, kept = sequence_ids.reshape(-1), mask.reshape(-1)
    flat = torch.where(kept, values.reshape(-1), 0.0).double()
    totals = flat.new_zeros(_num_sequences(ids)).index_add(0, ids, flat)
    counts = flat.new_zeros(totals.shape).index_add(0, ids, kept.double())
    return (totals / counts.clamp(min=1))[ids].view_as(values).to(values.dtype)


def sequence_min(values: torch.Tensor, mask: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    """Smallest of values over the masked-in tokens of its sequence, at each token; inf in a sequence that has none."""
    check_sequence_ids(sequence_ids, values)
    ids = sequence_ids.reshape(-1)
    flat = values.masked_fill(~mask, torch.inf).reshape(-1)
    smallest = flat.new_full((_num_sequences(ids),), torch.inf).scatter_reduce(0, ids, flat, "amin")
    return smallest[ids].view_as(values)


def check_sequence_ids(sequence_ids: torch.Tensor, per_token: torch.Tensor) -> None:
    """ValueError unless sequence_ids is int64 and of the shape of per_token."""
    if sequence_ids.dtype != torch.int64 or sequence_ids.shape != per_token.shape:
        raise ValueError(f"sequence_ids must be int64 {tuple(per_token.shape)}, "
                         f"not {sequence_ids.dtype} {tuple(sequence_ids.shape)}")


def _num_sequences(ids: torch.Tensor) -> int:
    return int(ids.max()) + 1 if ids.numel() else 0
