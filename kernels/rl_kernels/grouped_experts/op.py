"""grouped_experts: the routed experts of one MoE layer on this rank, forward and backward.

Letters: T tokens, K choices of a token, N = T * K slots (slot = token * K + choice), E experts of this rank,
H hidden size, F width of an expert. Rows are slots sorted by expert; slots of no expert come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from rl_kernels.grouped_experts.reference import grouped_experts_reference
from rl_kernels.pointwise import op as pointwise_op

__all__ = ["LowRank", "grouped_experts", "sorted_experts"]

Implementation = Literal["auto", "triton", "grouped_mm", "loop", "reference"]
Matrices = torch.Tensor | Sequence[torch.Tensor]
"""One tensor [E, ...], or E of them: separate parameters. Only "grouped_mm" stacks these, for the time of a product."""


@dataclass(frozen=True)
class LowRank:
    """scale * b_e a_e is added to the matrix of expert e: a_ERX [E, R, X], b_EYR [E, Y, R]."""

    a_ERX: Matrices
    b_EYR: Matrices
    scale: float


def grouped_experts(
    hidden_TH: torch.Tensor,
    gate_up_E2FH: Matrices,
    down_EHF: Matrices,
    indices_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    impl: Implementation = "auto",
) -> torch.Tensor:
    """[T, H] in the input dtype: sum over k of weights[t, k] * down_e (silu(gate_e h_t) * up_e h_t), e = indices[t, k].

    hidden_TH, gate_up_E2FH [E, 2F, H] (gate rows above up rows, Megatron's linear_fc1) and down_EHF [E, H, F] of one
    floating dtype; indices_TK int64, an index < 0 is a slot that adds nothing (dropped, or another rank's expert);
    weights_TK float.
    Gradients: to all but indices. Invariants: an expert without tokens gets a zero gradient; sums run in a fixed order,
    so equal inputs give equal bits.
    impl: "loop" one expert after the other (one host synchronisation); "grouped_mm" torch's grouped product (bfloat16
    only on CUDA); "triton" own kernels on CUDA or in Triton's interpreter; "reference" in float32. "auto" is "loop";
    nothing was measured on a GPU yet. Nothing falls back to another in silence.
    ValueError: shapes or dtypes that do not fit, an index >= E, an implementation that cannot run on these tensors.
    """
    _validate(hidden_TH, gate_up_E2FH, down_EHF, indices_TK, weights_TK)
    if impl == "reference":
        return grouped_experts_reference(hidden_TH, gate_up_E2FH, down_EHF, indices_TK, weights_TK).to(hidden_TH.dtype)
    order_N, ends_E = sort_slots(indices_TK, len(down_EHF))
    return _implementation(impl, hidden_TH, down_EHF)(hidden_TH, gate_up_E2FH, down_EHF, weights_TK, order_N, ends_E)


def sorted_experts(
    rows_NH: torch.Tensor,
    gate_up_E2FH: Matrices,
    down_EHF: Matrices,
    counts_E: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    impl: Implementation = "auto",
    gate_up_adapter: LowRank | None = None,
    down_adapter: LowRank | None = None,
    pointwise: pointwise_op.Implementation = "torch",
) -> torch.Tensor:
    """[N, H]: grouped_experts of rows that lie sorted by expert already, as Megatron's dispatchers leave them.

    gate_up_adapter, down_adapter: what is added to each expert's matrix, for "loop" and "grouped_mm".

    counts_E int64: how many rows each expert has, N in sum. "loop" and "reference" read them, so they want them on the
    CPU; "grouped_mm" and "triton" leave them on the device.
    pointwise: what computes the SwiGLU between the products of "loop" and "grouped_mm" (rl_kernels.pointwise).
    """
    if counts_E.shape != (len(down_EHF),) or counts_E.dtype != torch.int64:
        raise ValueError(f"counts_E must be int64 [{len(down_EHF)}], not {counts_E.dtype} {tuple(counts_E.shape)}")
    _check_sum(counts_E, rows_NH)
    _validate(rows_NH, gate_up_E2FH, down_EHF, None, weights_N[:, None])
    adapters = (gate_up_adapter, down_adapter)
    if any(adapters) and impl in ("reference", "triton"):
        raise ValueError(f"grouped_experts: impl={impl!r} has no adapters; use loop or grouped_mm")
    if impl == "reference":
        expert_E = torch.arange(len(counts_E), device=rows_NH.device)
        indices_N1 = expert_E.repeat_interleave(counts_E.to(rows_NH.device), output_size=len(rows_NH))[:, None]
        return grouped_experts_reference(rows_NH, gate_up_E2FH, down_EHF, indices_N1, weights_N[:, None]).to(
            rows_NH.dtype)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    run = _implementation(impl, rows_NH, down_EHF, pointwise)
    if any(adapters):
        run = partial(run, adapters=adapters)
    return run(rows_NH, gate_up_E2FH, down_EHF, weights_N[:, None], None, ends_E)


def sort_slots(indices_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order_N int64: the slot of each row, ends_E int32: the row after each expert's last), without a host sync."""
    key_N = torch.where(indices_TK < 0, num_experts, indices_TK).flatten()
    order_N = key_N.argsort(stable=True)
    ends_E = torch.searchsorted(key_N[order_N], torch.arange(num_experts, device=key_N.device), right=True)
    return order_N, ends_E.to(torch.int32)


def _implementation(impl: Implementation, hidden_TH, down_EHF, pointwise: pointwise_op.Implementation = "torch"):
    """(hidden, gate_up, down, weights_TK, order_N or None: rows are slots, ends_E) -> [T, H]"""
    swiglu = partial(pointwise_op.weighted_swiglu, impl=pointwise)
    if impl in ("auto", "loop"):
        return partial(_torch_experts, _loop_product, swiglu)
    if impl == "grouped_mm":
        _require_grouped_mm(hidden_TH, down_EHF[0])
        return partial(_torch_experts, _grouped_mm_product, swiglu)
    if impl != "triton":
        raise ValueError(f"grouped_experts: impl={impl!r} must be auto, triton, grouped_mm, loop or reference")
    from rl_kernels.grouped_experts.triton_impl import triton_experts
    from rl_kernels.triton_impl import require_device

    require_device(hidden_TH, "grouped_experts")
    return triton_experts


def _torch_experts(product, swiglu, hidden_TH, gate_up_E2FH, down_EHF, weights_TK, order_N, ends_E,
                   adapters=(None, None)):
    if order_N is None:
        return _products(product, swiglu, hidden_TH, gate_up_E2FH, down_EHF, weights_TK, ends_E, adapters)
    # rows past the last expert hold anything; `used` keeps them out of values and, by where's rule, of gradients
    (tokens, choices), hidden = weights_TK.shape, hidden_TH.shape[1]
    used_N1 = (torch.arange(tokens * choices, device=order_N.device) < ends_E[-1])[:, None]
    zero = torch.zeros((), dtype=hidden_TH.dtype, device=hidden_TH.device)
    rows_NH = torch.where(used_N1, hidden_TH[order_N // choices], zero)
    weights_N1 = torch.where(used_N1, weights_TK.flatten()[order_N, None], 0.0)
    out_NH = torch.where(used_N1, _products(product, swiglu, rows_NH, gate_up_E2FH, down_EHF, weights_N1, ends_E), zero)
    slots_NH = torch.zeros_like(out_NH).index_copy(0, order_N, out_NH)
    return slots_NH.view(tokens, choices, hidden).sum(1)


def _products(product, swiglu, rows_NH, gate_up_E2FH, down_EHF, weights_N1, ends_E, adapters=(None, None)):
    return _adapted(product, swiglu(_adapted(product, rows_NH, gate_up_E2FH, ends_E, adapters[0]), weights_N1),
                    down_EHF, ends_E, adapters[1])  # nested, so that the first product is not alive with the second


def _adapted(product, rows_NX, weights_EYX, ends_E, adapter: LowRank | None):
    out_NY = product(rows_NX, weights_EYX, ends_E)
    if adapter is None:
        return out_NY
    low_NR = adapter.scale * product(rows_NX, adapter.a_ERX, ends_E)  # the narrow side: nothing of [N, Y] more
    return out_NY + product(low_NR, adapter.b_EYR, ends_E)


def _loop_product(rows_NX, weights_EYX, ends_E):
    """[N, Y]: rows of expert e times weights[e]^T, one expert after the other."""
    ends = ends_E.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    *parts, rest = rows_NX.split([*sizes, len(rows_NX) - ends[-1]])
    outputs = [part @ weight.T for part, weight in zip(parts, weights_EYX, strict=True)]
    return torch.cat([*outputs, rest.new_zeros(len(rest), outputs[0].shape[1])])


def _grouped_mm_product(rows_NX, weights_EYX, ends_E):
    matrices = (weights_EYX,) if isinstance(weights_EYX, torch.Tensor) else tuple(weights_EYX)
    return _GroupedProduct.apply(rows_NX, ends_E.to(rows_NX.device, non_blocking=True), *matrices)


class _GroupedProduct(torch.autograd.Function):
    """torch._grouped_mm of rows and of E matrices, which are one tensor [E, Y, X] or separate parameters [Y, X].

    Separate ones are stacked for a product, in the forward and again in the backward pass, and the stack is not kept.
    An expert without rows gets a zero gradient, which torch._grouped_mm may leave unwritten on CUDA (reported for
    Blackwell), and no rows at all are not contracted over, which it refuses there. Gradients are made contiguous: it
    takes no others (torch 2.14.1).
    """

    @staticmethod
    def forward(ctx, rows_NX, ends_E, *matrices):
        ctx.save_for_backward(rows_NX, ends_E, *matrices)
        if not len(rows_NX):
            return rows_NX.new_zeros(0, matrices[0].shape[-2])
        return torch._grouped_mm(rows_NX, _stacked(matrices).transpose(-2, -1), offs=ends_E)

    @staticmethod
    def backward(ctx, grad_NY):
        rows_NX, ends_E, *matrices = ctx.saved_tensors
        if not len(rows_NX):
            return rows_NX, None, *(torch.zeros_like(matrix) for matrix in matrices)
        grad_NY, grad_rows = grad_NY.contiguous(), None
        if ctx.needs_input_grad[0]:
            grad_rows = torch._grouped_mm(grad_NY, _stacked(matrices), offs=ends_E)
        if not any(ctx.needs_input_grad[2:]):
            return grad_rows, None, *(None for _ in matrices)
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        grad_EYX = torch._grouped_mm(grad_NY.t(), rows_NX, offs=ends_E)
        grad_EYX = grad_EYX.masked_fill((counts_E == 0)[:, None, None], 0.0)
        return grad_rows, None, *((grad_EYX,) if matrices[0].dim() == 3 else grad_EYX.unbind())


def _stacked(matrices: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[E, Y, X]"""
    return matrices[0] if matrices[0].dim() == 3 else torch.stack(matrices)


def _require_grouped_mm(hidden_TH, down_HF):
    """ValueError where torch._grouped_mm (2.14) would refuse the dtype or a row of some matrix."""
    if hidden_TH.device.type == "cuda" and hidden_TH.dtype != torch.bfloat16:
        raise ValueError(f"grouped_experts: impl='grouped_mm' takes bfloat16 on CUDA, not {hidden_TH.dtype}")
    if any(size * hidden_TH.element_size() % 16 for size in down_HF.shape):
        raise ValueError("grouped_experts: impl='grouped_mm' wants rows of a multiple of 16 bytes, not H="
                         f"{down_HF.shape[0]}, F={down_HF.shape[1]} of {hidden_TH.dtype}")


def _check_sum(counts_E, rows_NH):
    """ValueError unless counts on the CPU add up to the rows; on CUDA the host does not ask."""
    if counts_E.device.type == "cpu" and int(counts_E.sum()) != len(rows_NH):
        raise ValueError(f"counts_E adds up to {int(counts_E.sum())} rows, rows_NH has {len(rows_NH)}")


def _validate(hidden_TH, gate_up_E2FH, down_EHF, indices_TK, weights_TK):
    """indices_TK None: rows sorted by expert."""
    experts = len(down_EHF)
    shapes = (f"hidden_TH {tuple(hidden_TH.shape)}, gate_up_E2FH {_shape(gate_up_E2FH)}, down_EHF {_shape(down_EHF)}, "
              f"weights_TK {tuple(weights_TK.shape)}")
    if hidden_TH.dim() != 2 or len(_shape(gate_up_E2FH)) != 3 or len(_shape(down_EHF)) != 3 or weights_TK.dim() != 2:
        raise ValueError(f"grouped_experts wants [T, H], [E, 2F, H], [E, H, F], [T, K], [T, K]: {shapes}")
    _, hidden, width = _shape(down_EHF)
    if _shape(gate_up_E2FH) != (experts, 2 * width, hidden) or hidden_TH.shape[1] != hidden or experts < 1:
        raise ValueError(f"hidden_TH, gate_up_E2FH and down_EHF must share E, F and H: {shapes}")
    if len(weights_TK) != len(hidden_TH) or weights_TK.shape[1] < 1 \
            or (indices_TK is not None and indices_TK.shape != weights_TK.shape):
        raise ValueError(f"indices_TK and weights_TK must be [T, K] with the T of hidden_TH: {shapes}")
    for name, matrices in (("gate_up_E2FH", gate_up_E2FH), ("down_EHF", down_EHF)):
        other = next((m.dtype for m in matrices if m.dtype != hidden_TH.dtype), None)
        if other is not None or not hidden_TH.is_floating_point():
            raise ValueError(f"hidden_TH ({hidden_TH.dtype}) and {name} ({other or hidden_TH.dtype}) must share a "
                             "floating dtype")
    if not weights_TK.is_floating_point():
        raise ValueError(f"weights_TK must be float, not {weights_TK.dtype}")
    if indices_TK is None:
        return
    if indices_TK.dtype != torch.int64:
        raise ValueError(f"indices_TK must be int64, not {indices_TK.dtype}")
    if indices_TK.device.type == "cpu" and indices_TK.numel() and int(indices_TK.max()) >= experts:
        raise ValueError(f"indices_TK holds {int(indices_TK.max())}, beyond the {experts} experts")


def _shape(matrices: Matrices) -> tuple[int, ...]:
    """[E, rows, columns] of one tensor or of E; (E,) where these differ."""
    if isinstance(matrices, torch.Tensor):
        return tuple(matrices.shape)
    shapes = {tuple(matrix.shape) for matrix in matrices}
    return (len(matrices), *(shapes.pop() if len(shapes) == 1 else ()))
