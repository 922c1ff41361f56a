"""grouped_experts: the routed experts of one MoE layer on this rank, forward and backward.

Letters: T tokens, K choices of a token, N = T * K slots (slot = token * K + choice), E experts of this rank,
H hidden size, F width of an expert. Rows are slots sorted by expert; slots of no expert come last.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from rl_kernels.grouped_experts.reference import grouped_experts_reference

__all__ = ["grouped_experts"]

Implementation = Literal["auto", "triton", "grouped_mm", "loop", "reference"]


def grouped_experts(
    hidden_TH: torch.Tensor,
    gate_up_E2FH: torch.Tensor,
    down_EHF: torch.Tensor,
    indices_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    impl: Implementation = "auto",
) -> torch.Tensor:
    """[T, H] in the input dtype: sum over k of weights[t, k] * down_e (silu(gate_e h_t) * up_e h_t), e = indices[t, k].

    hidden_TH, gate_up_E2FH [E, 2F, H] (gate rows above up rows, Megatron's linear_fc1) and down_EHF [E, H, F] of one
    floating dtype; indices_TK int64, an index < 0 is a slot that adds nothing (dropped, or another rank's expert);
    weights_TK float. Tokens already sorted by expert, as Megatron's dispatcher gives them, are the case K = 1.
    Gradients: to all but indices. Invariants: an expert without tokens gets a zero gradient; sums run in a fixed order,
    so equal inputs give equal bits.
    impl: "loop" one expert after the other (one host synchronisation); "grouped_mm" torch's grouped product (bfloat16
    only on CUDA); "triton" own kernels on CUDA or in Triton's interpreter; "reference" in float32. "auto" is "loop";
    nothing was measured on a GPU yet. Nothing falls back to another in silence.
    ValueError: shapes or dtypes that do not fit, an index >= E, an implementation that cannot run on these tensors.
    """
    tensors = (hidden_TH, gate_up_E2FH, down_EHF, indices_TK, weights_TK)
    _validate(*tensors)
    if impl == "reference":
        return grouped_experts_reference(*tensors).to(hidden_TH.dtype)
    if impl in ("auto", "loop"):
        return _torch_experts(*tensors, _loop_product)
    if impl == "grouped_mm":
        _require_grouped_mm(hidden_TH, down_EHF)
        return _torch_experts(*tensors, _grouped_mm_product)
    if impl != "triton":
        raise ValueError(f"grouped_experts: impl={impl!r} must be auto, triton, grouped_mm, loop or reference")
    from rl_kernels.grouped_experts.triton_impl import TritonExperts
    from rl_kernels.triton_impl import require_device

    require_device(hidden_TH, "grouped_experts")
    return TritonExperts.apply(hidden_TH, gate_up_E2FH, down_EHF, weights_TK, *sort_slots(indices_TK,
                                                                                          gate_up_E2FH.shape[0]))


def sort_slots(indices_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order_N int64: the slot of each row, ends_E int32: the row after each expert's last), without a host sync."""
    key_N = torch.where(indices_TK < 0, num_experts, indices_TK).flatten()
    order_N = key_N.argsort(stable=True)
    ends_E = torch.searchsorted(key_N[order_N], torch.arange(num_experts, device=key_N.device), right=True)
    return order_N, ends_E.to(torch.int32)


def _torch_experts(hidden_TH, gate_up_E2FH, down_EHF, indices_TK, weights_TK, product):
    """Rows past the last expert hold anything; `used` keeps them out of values and, by where's rule, of gradients."""
    (tokens, choices), hidden = indices_TK.shape, hidden_TH.shape[1]
    order_N, ends_E = sort_slots(indices_TK, gate_up_E2FH.shape[0])
    used_N1 = (torch.arange(tokens * choices, device=order_N.device) < ends_E[-1])[:, None]
    zero = torch.zeros((), dtype=hidden_TH.dtype, device=hidden_TH.device)
    rows_NH = torch.where(used_N1, hidden_TH[order_N // choices], zero)
    gate_NF, up_NF = product(rows_NH, gate_up_E2FH, ends_E).chunk(2, -1)
    weights_N1 = torch.where(used_N1, weights_TK.flatten()[order_N, None], 0.0)
    activated_NF = (F.silu(gate_NF) * up_NF * weights_N1).to(hidden_TH.dtype)
    out_NH = torch.where(used_N1, product(activated_NF, down_EHF, ends_E), zero)
    slots_NH = torch.zeros_like(out_NH).index_copy(0, order_N, out_NH)
    return slots_NH.view(tokens, choices, hidden).sum(1)


def _loop_product(rows_NX, weights_EYX, ends_E):
    """[N, Y]: rows of expert e times weights[e]^T, one expert after the other."""
    ends = ends_E.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    *parts, rest = rows_NX.split([*sizes, len(rows_NX) - ends[-1]])
    outputs = [part @ weight.T for part, weight in zip(parts, weights_EYX.unbind(0), strict=True)]
    return torch.cat([*outputs, rest.new_zeros(len(rest), weights_EYX.shape[1])])


def _grouped_mm_product(rows_NX, weights_EYX, ends_E):
    return _Contiguous.apply(torch._grouped_mm(rows_NX, weights_EYX.transpose(-2, -1), offs=ends_E))


class _Contiguous(torch.autograd.Function):
    """The identity with a contiguous gradient: the backward of torch._grouped_mm (2.14) refuses any other."""

    @staticmethod
    def forward(ctx, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


def _require_grouped_mm(hidden_TH, down_EHF):
    """ValueError where torch._grouped_mm (2.14) would refuse the dtype or a row of some matrix."""
    if hidden_TH.device.type == "cuda" and hidden_TH.dtype != torch.bfloat16:
        raise ValueError(f"grouped_experts: impl='grouped_mm' takes bfloat16 on CUDA, not {hidden_TH.dtype}")
    if any(size * hidden_TH.element_size() % 16 for size in down_EHF.shape[1:]):
        raise ValueError("grouped_experts: impl='grouped_mm' wants rows of a multiple of 16 bytes, not H="
                         f"{down_EHF.shape[1]}, F={down_EHF.shape[2]} of {hidden_TH.dtype}")


def _validate(hidden_TH, gate_up_E2FH, down_EHF, indices_TK, weights_TK):
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in (
        ("hidden_TH", hidden_TH), ("gate_up_E2FH", gate_up_E2FH), ("down_EHF", down_EHF), ("indices_TK", indices_TK),
        ("weights_TK", weights_TK)))
    if hidden_TH.dim() != 2 or gate_up_E2FH.dim() != 3 or down_EHF.dim() != 3 or indices_TK.dim() != 2:
        raise ValueError(f"grouped_experts wants [T, H], [E, 2F, H], [E, H, F], [T, K], [T, K]: {shapes}")
    experts, hidden, width = down_EHF.shape
    if gate_up_E2FH.shape != (experts, 2 * width, hidden) or hidden_TH.shape[1] != hidden or experts < 1:
        raise ValueError(f"hidden_TH, gate_up_E2FH and down_EHF must share E, F and H: {shapes}")
    if indices_TK.shape != weights_TK.shape or len(indices_TK) != len(hidden_TH) or indices_TK.shape[1] < 1:
        raise ValueError(f"indices_TK and weights_TK must be [T, K] with the T of hidden_TH: {shapes}")
    if not hidden_TH.dtype == gate_up_E2FH.dtype == down_EHF.dtype or not hidden_TH.is_floating_point():
        raise ValueError(f"hidden_TH ({hidden_TH.dtype}), gate_up_E2FH ({gate_up_E2FH.dtype}) and down_EHF "
                         f"({down_EHF.dtype}) must share a floating dtype")
    if indices_TK.dtype != torch.int64 or not weights_TK.is_floating_point():
        raise ValueError(f"indices_TK must be int64 ({indices_TK.dtype}) and weights_TK float ({weights_TK.dtype})")
    if indices_TK.device.type == "cpu" and indices_TK.numel() and int(indices_TK.max()) >= experts:
        raise ValueError(f"indices_TK holds {int(indices_TK.max())}, beyond the {experts} experts")
