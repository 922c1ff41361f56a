"""The head at a few tokens of the vocabulary per position: their log-probabilities, and which are the largest.

Letters: T tokens, H hidden size, V vocabulary rows that this rank holds, K tokens of the vocabulary at each position.
Both functions go chunk by chunk and take a group as linear_logprob does: hidden states and ids are the same on every
rank, and the gradient of the hidden states is partial.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from rl_kernels.linear_logprob.products import math_dtype, product

__all__ = ["chosen_logprobs", "largest_ids"]


def chosen_logprobs(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, logprobs_T: torch.Tensor,
                    ids_TK: torch.Tensor, *, temperature: float = 1.0, group: dist.ProcessGroup | None = None,
                    chunk_tokens: int = 1024, rounded: bool = False) -> torch.Tensor:
    """ln p(ids) [T, K], with gradient, float32 (float64 for float64 inputs).

    labels_T int64 [T] and logprobs_T [T]: a label, and what linear_logprob says of it, so that the normalisation over
    the vocabulary is not computed again: ln p(id) = ln p(label) + logit(id) - logit(label). ids_TK: int64, global.
    rounded: as in linear_logprob. No tensor is larger than chunk_tokens * (K + 1) * H or V * H elements.
    """
    first_row = 0 if group is None else dist.get_rank(group) * weight_VH.shape[0]
    wanted = torch.cat([labels_T[:, None], ids_TK], 1)
    logits_TW = _ChosenLogits.apply(hidden_TH, weight_VH, wanted, first_row, group, chunk_tokens, rounded) / temperature
    return logprobs_T[:, None] + (logits_TW[:, 1:] - logits_TW[:, :1])


@torch.no_grad()
def largest_ids(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, k: int, *, group: dist.ProcessGroup | None = None,
                chunk_tokens: int = 1024, rounded: bool = False) -> torch.Tensor:
    """int64 [T, k]: the k most probable tokens of the whole vocabulary, the most probable first.

    ValueError: the vocabulary has fewer.
    """
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    rows = weight_VH.shape[0]
    if not 1 <= k <= world * rows:
        raise ValueError(f"k={k} must lie between 1 and the vocabulary of {world * rows} rows")
    found = []
    for hidden_CH in hidden_TH.split(chunk_tokens):
        logits_CV = product(hidden_CH, weight_VH.T)
        if rounded:
            logits_CV = logits_CV.to(weight_VH.dtype).to(logits_CV.dtype)
        best, ids = logits_CV.topk(min(k, rows), -1)
        ids = ids + rank * rows
        if group is not None and world > 1:
            best, ids = (_of_all_ranks(each, world, group) for each in (best, ids))
            ids = ids.gather(1, best.topk(k, -1).indices)
        found.append(ids)
    return torch.cat(found) if found else torch.zeros(0, k, dtype=torch.int64, device=hidden_TH.device)


def _of_all_ranks(values_CK: torch.Tensor, world: int, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(values_CK) for _ in range(world)]
    dist.all_gather(parts, values_CK.contiguous(), group=group)
    return torch.cat(parts, 1)


class _ChosenLogits(torch.autograd.Function):
    """hidden . weight[ids], [T, K]; each rank adds its own rows."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, ids_TK, first_row, group, chunk_tokens, rounded):
        local_TK = ids_TK - first_row
        here_TK = (local_TK >= 0) & (local_TK < weight_VH.shape[0])
        local_TK = torch.where(here_TK, local_TK, 0)
        ctx.save_for_backward(hidden_TH, weight_VH, local_TK, here_TK)
        ctx.chunk_tokens, dtype = chunk_tokens, math_dtype(hidden_TH)
        logits_TK = torch.zeros(ids_TK.shape, dtype=dtype, device=hidden_TH.device)
        for rows in _chunks(len(ids_TK), chunk_tokens):
            logits_TK[rows] = torch.einsum("th,tkh->tk", hidden_TH[rows].to(dtype), weight_VH[local_TK[rows]].to(dtype))
        if rounded:
            logits_TK = logits_TK.to(weight_VH.dtype).to(dtype)
        logits_TK = torch.where(here_TK, logits_TK, 0.0)
        if group is not None:
            dist.all_reduce(logits_TK, group=group)
        return logits_TK

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TK):
        hidden_TH, weight_VH, local_TK, here_TK = ctx.saved_tensors
        grad_TK, dtype = torch.where(here_TK, grad_TK, 0.0), grad_TK.dtype
        grad_hidden_TH = torch.zeros_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(grad_TK), ctx.chunk_tokens):
            grad_hidden_TH[rows] = torch.einsum("tk,tkh->th", grad_TK[rows], weight_VH[local_TK[rows]].to(dtype)).to(
                hidden_TH.dtype)
            if grad_weight_VH is not None:
                outer = grad_TK[rows][..., None] * hidden_TH[rows][:, None].to(dtype)
                grad_weight_VH.index_add_(0, local_TK[rows].flatten(), outer.flatten(0, 1))
        grad_weight = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_TH, grad_weight, None, None, None, None, None


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, tokens, size)]
