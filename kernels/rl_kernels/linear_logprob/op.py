"""linear_logprob: log-probability of the label and exact entropy per token, without logits of all tokens.

Letters: T tokens, H hidden size, V vocabulary rows that this rank holds, S partial statistics of one token.
Forward keeps two numbers per token (log-sum-exp and entropy); backward makes the logits again, block by block.
Products are summed in float32 and never rounded to 16 bits (products.py), everything after them is float32; for
float64 inputs all is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from rl_kernels.linear_logprob import chunked
from rl_kernels.linear_logprob.liger import linear_logprob_liger
from rl_kernels.linear_logprob.products import add_product, math_dtype
from rl_kernels.linear_logprob.reference import linear_logprob_reference

__all__ = ["Implementation", "linear_logprob"]

NOT_HERE = -2**30
"""Row of a label that this rank does not hold; stays negative however many rows of a block are subtracted."""
Implementation = Literal["auto", "triton", "fused", "chunked", "liger", "reference"]


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
    rounded: bool = False,
    impl: Implementation = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(label) and entropy (nats) of softmax((h * column_scale) W^T / temperature), each float32 [T].

    hidden_TH [T, H] and weight_VH [V, H] of one floating dtype; labels_T int64 [T], a label < 0 (such as -100)
    marks an ignored row: log-prob 0, entropy 0, no gradient, whatever its hidden state holds.
    column_scale_H [H]: NormHead folded into the hidden states, without gradient of its own.
    group of more than one rank: vocabulary-parallel. weight_VH is rows [rank*V, (rank+1)*V) of the whole head,
    labels stay global ids, hidden_TH and labels_T are the same on every rank, and so are the outputs. The
    gradient of hidden_TH is then PARTIAL: this rank's vocabulary's share, which the caller's tensor-parallel
    region must sum over the group. The gradient of weight_VH is whole.
    with_entropy False: entropy is None. rounded: each logit is rounded to the inputs' dtype, as by an engine whose head
    is not float32; "chunked" and "reference" can. Outputs are float64 for float64 inputs.
    impl: "chunked" is plain torch; "triton" computes products in its own kernels, "fused" by torch and all that follows
    them in one kernel, and both need a CUDA tensor or Triton's interpreter; "liger" needs that package; "reference"
    holds all logits. The last two know one rank only. "auto" is "chunked", the only one measured so far.
    Nothing falls back to another in silence.
    Invariants: neither outputs nor gradients depend on chunk_tokens or on the number of ranks; no tensor is
    larger than chunk_tokens * V, T * H or V * H elements (triton: 2**26, T * H or V * H).
    ValueError: shapes or dtypes that do not fit, temperature or chunk_tokens not positive, an implementation that
    cannot run on these tensors, a label >= the whole V (on a GPU, where looking would stop the host, its log-prob is
    NaN instead).
    """
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    _validate(hidden_TH, weight_VH, labels_T, temperature, column_scale_H, chunk_tokens, world)
    scale_H = None if column_scale_H is None else column_scale_H.detach()
    if world > 1 and impl in ("liger", "reference"):
        raise ValueError(f"linear_logprob: impl={impl!r} knows one rank; use 'chunked' or 'triton' with a group")
    if rounded and impl in ("liger", "triton", "fused"):
        raise ValueError(f"linear_logprob: impl={impl!r} does not round logits; use 'chunked' or 'reference'")
    if impl == "liger":
        return linear_logprob_liger(_scaled(hidden_TH, labels_T, scale_H), weight_VH, labels_T,
                                    temperature=temperature, with_entropy=with_entropy)
    if impl == "reference":
        logprobs_T, entropy_T = linear_logprob_reference(hidden_TH, weight_VH, labels_T, temperature=temperature,
                                                         column_scale_H=scale_H, rounded=rounded)
        return logprobs_T, entropy_T if with_entropy else None
    rows = weight_VH.shape[0]
    head = _Head(_backend(impl, hidden_TH), temperature, chunk_tokens, rank * rows, world * rows,
                 group if world > 1 else None, with_entropy, rounded)
    return _LinearLogprob.apply(hidden_TH, weight_VH, labels_T, scale_H, head)


def _backend(impl: Implementation, tensor: torch.Tensor) -> ModuleType:
    if impl in ("auto", "chunked"):
        return chunked
    if impl == "fused":
        from rl_kernels.linear_logprob import fused

        return fused  # its operators look at the device
    if impl != "triton":
        raise ValueError(f"linear_logprob: impl={impl!r} must be auto, triton, fused, chunked, liger or reference")
    from rl_kernels.linear_logprob import triton_impl
    from rl_kernels.triton_impl import require_device

    require_device(tensor, "linear_logprob")
    return triton_impl


@dataclass(frozen=True)
class _Head:
    """What forward and backward share besides tensors. first_row: global id of this rank's first weight row; vocab:
    rows of the whole head."""

    backend: ModuleType
    temperature: float
    chunk_tokens: int
    first_row: int
    vocab: int
    group: dist.ProcessGroup | None
    with_entropy: bool
    rounded: bool

    def block(self, tokens: int, device: torch.device) -> tuple[int, int]:
        """(tokens, vocabulary rows) of a block of logit gradients."""
        return self.backend.block(tokens, self.chunk_tokens, device)


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
    """(logprobs_T, entropy_T or None, lse_T) in the math dtype; lse_T is log-sum-exp over the whole vocabulary."""
    max_T, exp_sum_T, dot_T, label_T = _merge(*head.backend.statistics(
        _scaled(hidden_TH, labels_T, scale_H), weight_VH, _local_labels(labels_T, weight_VH.shape[0], head),
        temperature=head.temperature, with_entropy=head.with_entropy, chunk_tokens=head.chunk_tokens,
        rounded=head.rounded), head.group)
    valid_T, zeros_T = labels_T >= 0, torch.zeros_like(max_T)
    log_sum_T = exp_sum_T.log()
    lse_T = max_T + log_sum_T
    logprobs_T = torch.where(valid_T, (label_T - max_T) - log_sum_T, zeros_T)
    logprobs_T = torch.where(labels_T < head.vocab, logprobs_T, torch.nan)  # only where _validate does not look
    # H = lse - E[logit]; with the maximum taken out of both, here as above, nothing large cancels.
    entropy_T = torch.where(valid_T, log_sum_T - dot_T / exp_sum_T, zeros_T) if head.with_entropy else None
    return logprobs_T, entropy_T, lse_T


def _merge(max_ST, exp_sum_ST, dot_ST, label_ST, group):
    """Add the statistics of S splits and of all ranks after moving them to the common maximum: [S, T] -> [T] each."""
    max_T = max_ST.amax(0)
    if group is not None:
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
    down_ST = max_ST - max_T
    factor_ST = down_ST.exp()
    sums = torch.stack([exp_sum_ST * factor_ST, (dot_ST + down_ST * exp_sum_ST) * factor_ST, label_ST]).sum(1)
    if group is not None:
        dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
    return max_T, *sums.unbind(0)


def _backward(hidden_TH, weight_VH, labels_T, scale_H, lse_T, entropy_T, head, grad_logprobs_T, grad_entropy_T, wanted):
    """Gradients of hidden (this rank's share) and weight, in their dtypes; None where not wanted.

    No communication: log-sum-exp and entropy already cover the whole vocabulary. Vocabulary blocks are the outer loop,
    so that each row of the weight's gradient is summed in the math dtype and written once.
    """
    zeros_T, tokens = torch.zeros_like(lse_T), hidden_TH.shape[0]
    kept_TH = _kept(hidden_TH, labels_T)
    scaled_TH = _scaled(hidden_TH, labels_T, scale_H)
    local_T = _local_labels(labels_T, weight_VH.shape[0], head)
    g_logprob_T = zeros_T if grad_logprobs_T is None else torch.where(labels_T >= 0, grad_logprobs_T, zeros_T)
    g_entropy_T = None if grad_entropy_T is None else torch.where(labels_T >= 0, grad_entropy_T, zeros_T)
    grad_scaled_TH = torch.zeros_like(hidden_TH, dtype=lse_T.dtype) if wanted[0] else None
    grad_weight_VH = torch.zeros_like(weight_VH) if wanted[1] else None
    chunk, width = head.block(tokens, hidden_TH.device)
    for first in range(0, weight_VH.shape[0], width):
        weight_BH = weight_VH[first:first + width]
        sum_BH = None
        if wanted[1]:
            own_BH = grad_weight_VH[first:first + width]
            sum_BH = own_BH if own_BH.dtype == lse_T.dtype else torch.zeros_like(own_BH, dtype=lse_T.dtype)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            parts_CB = head.backend.gradient_block(
                scaled_TH[rows], weight_BH, local_T[rows] - first, lse_T[rows],
                None if entropy_T is None else entropy_T[rows], g_logprob_T[rows],
                None if g_entropy_T is None else g_entropy_T[rows], temperature=head.temperature,
                rounded=head.rounded)
            for part_CB in parts_CB:
                if wanted[0]:
                    add_product(grad_scaled_TH[rows], part_CB, weight_BH)
                if wanted[1]:
                    add_product(sum_BH, part_CB.T, kept_TH[rows])
            del parts_CB, part_CB  # before the next block's are made
        if wanted[1] and scale_H is not None:
            sum_BH *= scale_H.to(sum_BH.dtype)
        if wanted[1] and sum_BH is not own_BH:
            own_BH.copy_(sum_BH)
    if wanted[0] and scale_H is not None:
        grad_scaled_TH *= scale_H.to(grad_scaled_TH.dtype)
    return grad_scaled_TH.to(hidden_TH.dtype) if wanted[0] else None, grad_weight_VH


def _kept(hidden_TH, labels_T):
    """Hidden states with ignored rows zero."""
    return torch.where(labels_T[:, None] >= 0, hidden_TH, torch.zeros((), dtype=hidden_TH.dtype,
                                                                      device=hidden_TH.device))


def _scaled(hidden_TH, labels_T, scale_H):
    """_kept with NormHead's factors, in the math dtype then."""
    kept_TH = _kept(hidden_TH, labels_T)
    if scale_H is None:
        return kept_TH
    dtype = math_dtype(hidden_TH)
    return kept_TH.to(dtype) * scale_H.to(dtype)


def _local_labels(labels_T, rows, head):
    """int32 [T]: the label's row of this rank's weight; far below zero where it is ignored or another rank's."""
    local_T = labels_T - head.first_row
    here_T = (labels_T >= 0) & (local_T >= 0) & (local_T < rows)
    return torch.where(here_T, local_T, NOT_HERE).to(torch.int32)


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
    # on a GPU the look at the labels would make the host wait for everything before it; _forward gives NaN there
    if labels_T.device.type == "cpu" and labels_T.numel() and int(labels_T.max()) >= vocab:
        raise ValueError(f"labels_T holds {int(labels_T.max())}, beyond the vocabulary of {vocab} rows")
