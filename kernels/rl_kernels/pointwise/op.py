"""What a layer computes between its matrix products: the experts' SwiGLU with routing weights, and the rotation.

Letters: N rows, F width of an expert, T tokens, H heads, D head dimension, d rotated dimensions.
As separate operations of torch these read and write each row many times. The Triton kernels read it once, write it
once, compute in float32 and round once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

__all__ = ["Implementation", "rotate", "weighted_swiglu"]

Implementation = Literal["torch", "triton"]


def weighted_swiglu(gate_up_N2F: torch.Tensor, weights_N1: torch.Tensor | None = None, *,
                    impl: Implementation = "torch") -> torch.Tensor:
    """silu(gate) * up * weight, [N, F] in the dtype of gate_up.

    gate_up_N2F [N, 2F] of any floating dtype, gate before up; weights_N1 [N, 1], float, None: 1.
    Gradients: to both. Only the inputs are kept for the backward pass, which computes the rest again.
    impl: "triton" needs a CUDA tensor or Triton's interpreter. ValueError: shapes that do not fit.
    """
    rows, both = gate_up_N2F.shape
    if both % 2 or (weights_N1 is not None and weights_N1.shape != (rows, 1)):
        raise ValueError(f"weighted_swiglu wants [N, 2F] and [N, 1], not {tuple(gate_up_N2F.shape)} and "
                         f"{None if weights_N1 is None else tuple(weights_N1.shape)}")
    return _WeightedSwiGLU.apply(gate_up_N2F, weights_N1, _with_kernels(impl))


def rotate(heads_THD: torch.Tensor, cosine_T1d: torch.Tensor, sine_T1d: torch.Tensor, *,
           impl: Implementation = "torch") -> torch.Tensor:
    """heads, whose first d dimensions are turned in the plane of each i of their first half and i + d/2, [T, H, D].

    cosine_T1d, sine_T1d [T, 1, d], float32, both halves alike. In float32, rounded once. Gradients: to heads.
    """
    if _with_kernels(impl):
        return _Rotation.apply(heads_THD, cosine_T1d, sine_T1d)
    dim = cosine_T1d.shape[-1]
    turning, rest = heads_THD[..., :dim], heads_THD[..., dim:]
    first, second = turning.chunk(2, dim=-1)
    turned = (turning * cosine_T1d + torch.cat([-second, first], -1) * sine_T1d).to(heads_THD.dtype)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def _with_kernels(impl: Implementation) -> bool:
    if impl not in ("torch", "triton"):
        raise ValueError(f"pointwise: impl={impl!r} must be torch or triton")
    return impl == "triton"


class _WeightedSwiGLU(torch.autograd.Function):
    """(gate_up [N, 2F], weights [N, 1] or None, whether by kernels) -> [N, F]. Autograd would keep two more [N, F] and
    copies of these in float32."""

    @staticmethod
    def forward(ctx, gate_up_N2F, weights_N1, kernels):
        ctx.save_for_backward(gate_up_N2F, weights_N1)
        ctx.kernels = kernels
        if kernels:
            return swiglu_op(gate_up_N2F, weights_N1)
        gate_NF, up_NF = gate_up_N2F.chunk(2, -1)
        activated_NF = F.silu(gate_NF).mul_(up_NF)
        return activated_NF if weights_N1 is None else (activated_NF * weights_N1).to(gate_up_N2F.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF):
        """With few [N, F] at a time: here a step of a large model has its peak."""
        gate_up_N2F, weights_N1 = ctx.saved_tensors
        if ctx.kernels:
            grad_gate_up_N2F, grad_weights_N1 = swiglu_gradients_op(grad_NF, gate_up_N2F, weights_N1)
            return grad_gate_up_N2F, None if weights_N1 is None else grad_weights_N1.to(weights_N1.dtype), None
        gate_NF, up_NF = gate_up_N2F.chunk(2, -1)
        silu_NF, grad_weights_N1, weighted_NF = F.silu(gate_NF), None, grad_NF.clone()
        if weights_N1 is not None:
            grad_weights_N1 = (silu_NF * up_NF).to(weights_N1.dtype).mul_(grad_NF).sum(1, keepdim=True)
            weighted_NF = (grad_NF * weights_N1).to(grad_NF.dtype)
        grad_gate_up_N2F = torch.empty_like(gate_up_N2F)
        grad_gate_NF, grad_up_NF = grad_gate_up_N2F.chunk(2, -1)
        torch.mul(weighted_NF, silu_NF, out=grad_up_NF)
        torch.ops.aten.silu_backward.grad_input(weighted_NF.mul_(up_NF), gate_NF, grad_input=grad_gate_NF)
        return grad_gate_up_N2F, grad_weights_N1, None


class _Rotation(torch.autograd.Function):
    """(heads [T, H, D], cosine, sine) -> [T, H, D] by the kernel. Its gradient is turned back."""

    @staticmethod
    def forward(ctx, heads_THD, cosine_T1d, sine_T1d):
        ctx.save_for_backward(cosine_T1d, sine_T1d)
        return rotated_op(heads_THD, cosine_T1d, sine_T1d, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THD):
        return rotated_op(grad_THD, *ctx.saved_tensors, True), None, None


# The kernels as operators that torch's dispatcher sees: a rehearsal counts what they move, and needs no Triton.

@torch.library.custom_op("rl_kernels::swiglu", mutates_args=())
def swiglu_op(gate_up_N2F: torch.Tensor, weights_N1: torch.Tensor | None) -> torch.Tensor:
    return _kernels(gate_up_N2F).swiglu(gate_up_N2F.contiguous(), None if weights_N1 is None
                                        else weights_N1.contiguous())


@swiglu_op.register_fake
def _(gate_up_N2F, weights_N1):
    return gate_up_N2F.new_empty(gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2)


@torch.library.custom_op("rl_kernels::swiglu_gradients", mutates_args=())
def swiglu_gradients_op(grad_NF: torch.Tensor, gate_up_N2F: torch.Tensor,
                        weights_N1: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of gate_up [N, 2F], of weights float32 [N, 1], or empty without weights)"""
    found = _gradients_like(gate_up_N2F, weights_N1)
    _kernels(gate_up_N2F).swiglu_gradients(grad_NF.contiguous(), gate_up_N2F.contiguous(),
                                           None if weights_N1 is None else weights_N1.contiguous(), *found)
    return found


@swiglu_gradients_op.register_fake
def _(grad_NF, gate_up_N2F, weights_N1):
    return _gradients_like(gate_up_N2F, weights_N1)


def _gradients_like(gate_up_N2F, weights_N1):
    rows = 0 if weights_N1 is None else len(weights_N1)
    return (torch.empty(gate_up_N2F.shape, dtype=gate_up_N2F.dtype, device=gate_up_N2F.device),
            gate_up_N2F.new_empty(rows, 1, dtype=torch.float32))


@torch.library.custom_op("rl_kernels::rotate", mutates_args=())
def rotated_op(heads_THD: torch.Tensor, cosine_T1d: torch.Tensor, sine_T1d: torch.Tensor, back: bool) -> torch.Tensor:
    """back: by the negative angles."""
    heads_THD = heads_THD if heads_THD.stride(-1) == 1 else heads_THD.contiguous()
    return _kernels(heads_THD).rotated(heads_THD, cosine_T1d.contiguous(), sine_T1d.contiguous(), back)


@rotated_op.register_fake
def _(heads_THD, cosine_T1d, sine_T1d, back):
    return heads_THD.new_empty(heads_THD.shape)


def _kernels(tensor: torch.Tensor) -> ModuleType:
    from rl_kernels.pointwise import triton_impl
    from rl_kernels.triton_impl import require_device

    require_device(tensor, "pointwise")
    return triton_impl
