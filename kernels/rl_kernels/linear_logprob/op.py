"""linear_logprob: log-probability of the label and exact entropy per token, a few rows of logits at a time.

Letters: T tokens, C rows of one chunk, H hidden size, V vocabulary rows that this rank holds.
Forward keeps two numbers per token (log-sum-exp and entropy); backward makes the logits again, chunk by
chunk. The matmul runs in the input dtype, everything after it in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

__all__ = ["linear_logprob"]


def linear_logprob(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    column_scale_H: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(label) and entropy (nats) of softmax((h * column_scale) W^T / temperature), each float32 [T].

    hidden_TH [T, H] and weight_VH [V, H] of one floating dtype; labels_T int64 [T], a label < 0 (such as -100)
    marks an ignored row: log-prob 0, entropy 0, no gradient, whatever its hidden state holds.
    column_scale_H [H]: NormHead folded into the hidden states, without gradient of its own.
    group of more than one rank: vocabulary-parallel. weight_VH is rows [rank*V, (rank+1)*V) of the whole head,
    labels stay global ids, hidden_TH and labels_T are the same on every rank, and so are the outputs. The
    gradient of hidden_TH is then PARTIAL: this rank's vocabulary's share, which the caller's tensor-parallel
    region must sum over the group. The gradient of weight_VH is whole.
    with_entropy False: entropy is None. Outputs are float64 for float64 inputs.
    Invariants: neither outputs nor gradients depend on chunk_tokens or on the number of ranks; no tensor is
    larger than chunk_tokens * V, T * H or V * H elements.
    ValueError: shapes or dtypes that do not fit, temperature or chunk_tokens not positive, a label >= the whole V.
    """
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    _validate(hidden_TH, weight_VH, labels_T, temperature, column_scale_H, chunk_tokens, world)
    head = _Head(temperature, chunk_tokens, rank * weight_VH.shape[0], group if world > 1 else None, with_entropy)
    scale_H = None if column_scale_H is None else column_scale_H.detach()
    return _LinearLogprob.apply(hidden_TH, weight_VH, labels_T, scale_H, head)


@dataclass(frozen=True)
class _Head:
    """What forward and backward share besides tensors. first_row: global id of this rank's first weight row."""

    temperature: float
    chunk_tokens: int
    first_row: int
    group: dist.ProcessGroup | None
    with_entropy: bool


class _LinearLogprob(torch.autograd.Function):
    """Where no gradient is needed autograd drops the context at once: nothing stays saved."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, labels_T, scale_H, head):
        ctx.set_materialize_grads(False)
        logprobs_T, entropy_T, lse_T = _forward(hidden_TH, weight_VH, labels_T, scale_H, head)
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, scale_H, lse_T, entropy_T)
        ctx.head = head
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        wanted = ctx.needs_input_grad[:2]
        grads = _backward(*ctx.saved_tensors, ctx.head, grad_logprobs_T, grad_entropy_T, wanted)
        return *grads, None, None, None


def _forward(hidden_TH, weight_VH, labels_T, scale_H, head):
    """(logprobs_T, entropy_T or None, lse_T) in the math dtype; lse_T is log-sum-exp over the whole vocabulary.

    Each chunk leaves a running softmax of its own rank's rows (max, sum of exp, sum of exp * logit, label logit);
    ranks are merged afterwards, twice one all-reduce for all tokens.
    """
    tokens = hidden_TH.shape[0]
    max_T, exp_sum_T, dot_T, label_T = hidden_TH.new_zeros((4, tokens), dtype=_math_dtype(hidden_TH)).unbind(0)
    for start in range(0, tokens, head.chunk_tokens):
        rows = slice(start, start + head.chunk_tokens)
        _, logits_CV = _chunk_logits(hidden_TH[rows], weight_VH, labels_T[rows], scale_H, head)
        local_C, owned_C = _local_labels(labels_T[rows], weight_VH.shape[0], head)
        label_C = logits_CV.gather(1, local_C[:, None]).squeeze(1)
        label_T[rows] = torch.where(owned_C, label_C, torch.zeros_like(label_C))
        max_T[rows] = logits_CV.amax(1)
        shifted_CV = logits_CV.sub_(max_T[rows, None])
        exp_CV = shifted_CV.exp()
        exp_sum_T[rows] = exp_CV.sum(1)
        if head.with_entropy:
            dot_T[rows] = exp_CV.mul_(shifted_CV).sum(1)
    if head.group is not None:
        max_T, exp_sum_T, dot_T, label_T = _merge_ranks(max_T, exp_sum_T, dot_T, label_T, head.group)

    valid_T, zeros_T = labels_T >= 0, torch.zeros_like(max_T)
    log_sum_T = exp_sum_T.log()
    lse_T = max_T + log_sum_T
    logprobs_T = torch.where(valid_T, label_T - lse_T, zeros_T)
    # H = lse - E[logit]; with the maximum taken out of both, nothing large cancels.
    entropy_T = torch.where(valid_T, log_sum_T - dot_T / exp_sum_T, zeros_T) if head.with_entropy else None
    return logprobs_T, entropy_T, lse_T


def _merge_ranks(max_T, exp_sum_T, dot_T, label_T, group):
    """Move every rank's sums to the common maximum, then add. The label's logit is 0 on ranks that lack it."""
    global_max_T = max_T.clone()
    dist.all_reduce(global_max_T, op=dist.ReduceOp.MAX, group=group)
    down_T = max_T - global_max_T
    sums = torch.stack([exp_sum_T * down_T.exp(), (dot_T + down_T * exp_sum_T) * down_T.exp(), label_T])
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
    return global_max_T, *sums.unbind(0)


def _backward(hidden_TH, weight_VH, labels_T, scale_H, lse_T, entropy_T, head, grad_logprobs_T, grad_entropy_T, wanted):
    """Gradients of hidden (this rank's share) and weight, in their dtypes; None where not wanted.

    d loss / d logit_j = g_lp (1[j = label] - p_j) - g_H p_j (log p_j + H), all over temperature.
    No communication: log-sum-exp and entropy already cover the whole vocabulary.
    """
    grad_hidden_TH = torch.zeros_like(hidden_TH) if wanted[0] else None
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=_math_dtype(hidden_TH)) if wanted[1] else None
    zeros_T = torch.zeros_like(lse_T)
    g_lp_T = zeros_T if grad_logprobs_T is None else torch.where(labels_T >= 0, grad_logprobs_T, zeros_T)
    g_H_T = None if grad_entropy_T is None else torch.where(labels_T >= 0, grad_entropy_T, zeros_T)
    for start in range(0, hidden_TH.shape[0], head.chunk_tokens):
        rows = slice(start, start + head.chunk_tokens)
        scaled_CH, logits_CV = _chunk_logits(hidden_TH[rows], weight_VH, labels_T[rows], scale_H, head)
        logp_CV = logits_CV.sub_(lse_T[rows, None])
        grad_CV = logp_CV.exp()
        if g_H_T is None:
            grad_CV.mul_(g_lp_T[rows, None])
        else:
            grad_CV.mul_(logp_CV.add_(entropy_T[rows, None]).mul_(g_H_T[rows, None]).add_(g_lp_T[rows, None]))
        local_C, owned_C = _local_labels(labels_T[rows], weight_VH.shape[0], head)
        label_term_C = torch.where(owned_C, -g_lp_T[rows], zeros_T[rows])
        grad_CV.scatter_add_(1, local_C[:, None], label_term_C[:, None])
        grad_logits_CV = grad_CV.div_(-head.temperature).to(hidden_TH.dtype)
        if grad_hidden_TH is not None:
            grad_CH = grad_logits_CV @ weight_VH
            grad_hidden_TH[rows] = grad_CH if scale_H is None else _scale(grad_CH, scale_H)
        if grad_weight_VH is not None:
            grad_weight_VH += grad_logits_CV.T @ scaled_CH
    return grad_hidden_TH, None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)


def _chunk_logits(hidden_CH, weight_VH, labels_C, scale_H, head):
    """(scaled hidden states [C, H] in the input dtype, logits [C, V] in the math dtype, a buffer of our own)."""
    scaled_CH = torch.where(labels_C[:, None] >= 0, hidden_CH, torch.zeros_like(hidden_CH))
    if scale_H is not None:
        scaled_CH = _scale(scaled_CH, scale_H)
    logits_CV = (scaled_CH @ weight_VH.T).to(_math_dtype(hidden_CH))
    return scaled_CH, logits_CV if head.temperature == 1.0 else logits_CV.div_(head.temperature)


def _scale(values_CH, scale_H):
    return (values_CH.to(_math_dtype(values_CH)) * scale_H.to(_math_dtype(values_CH))).to(values_CH.dtype)


def _local_labels(labels_C, local_rows, head):
    """(index into this rank's rows, 0 where it has no such row; bool: this rank owns the label)."""
    local_C = labels_C - head.first_row
    owned_C = (labels_C >= 0) & (local_C >= 0) & (local_C < local_rows)
    return torch.where(owned_C, local_C, torch.zeros_like(local_C)), owned_C


def _math_dtype(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _validate(hidden_TH, weight_VH, labels_T, temperature, column_scale_H, chunk_tokens, world):
    shapes = f"hidden_TH {tuple(hidden_TH.shape)}, weight_VH {tuple(weight_VH.shape)}, labels_T {tuple(labels_T.shape)}"
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"hidden_TH must be [T, H] and weight_VH [V, H] with the same H: {shapes}")
    if labels_T.shape != hidden_TH.shape[:1]:
        raise ValueError(f"labels_T must be [T] with the T of hidden_TH: {shapes}")
    if hidden_TH.dtype != weight_VH.dtype or not hidden_TH.is_floating_point():
        raise ValueError(f"hidden_TH ({hidden_TH.dtype}) and weight_VH ({weight_VH.dtype}) must share a floating dtype")
    if labels_T.dtype != torch.int64:
        raise ValueError(f"labels_T must be int64, not {labels_T.dtype}")
    if column_scale_H is not None and column_scale_H.shape != hidden_TH.shape[1:]:
        raise ValueError(f"column_scale_H must be [H], not {tuple(column_scale_H.shape)}: {shapes}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    vocab = world * weight_VH.shape[0]
    if vocab < 1:
        raise ValueError(f"weight_VH has no rows: {shapes}")
    if labels_T.numel() and int(labels_T.max()) >= vocab:
        raise ValueError(f"labels_T holds {int(labels_T.max())}, beyond the vocabulary of {vocab} rows")
