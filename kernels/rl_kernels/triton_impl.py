"""What the Triton kernels of this package share. Only modules named triton_impl import triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1 was set when triton was imported: kernels run in numpy, on the CPU."""
SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


def require_device(tensor: torch.Tensor, op: str) -> None:
    """ValueError where a kernel could not run on this tensor: no CUDA device and no interpreter, or another dtype."""
    if tensor.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"{op}: impl='triton' needs a CUDA tensor, not one on {tensor.device} (the interpreter, "
                         "TRITON_INTERPRET=1, runs it on the CPU)")
    if tensor.dtype not in SUPPORTED:
        raise ValueError(f"{op}: impl='triton' takes {', '.join(map(str, SUPPORTED))}, not {tensor.dtype}")


@triton.jit
def dot(a, b, accumulator, INTERPRETED: tl.constexpr):
    """accumulator + a @ b in float32; float32 operands are not rounded to tf32.

    A float32 `a` beside a 16-bit `b` goes in as two 16-bit parts, which keep 16 of its bits.

    The interpreter of triton 3.8 keeps bfloat16 as its bits (interpreter.create_dot multiplies them as integers), so
    there the operands are widened, which loses nothing: a product of two bfloat16 is exact in float32.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype != b.dtype:
        high = a.to(b.dtype)
        accumulator = tl.dot(high, b, accumulator)
        a = (a - high.to(tl.float32)).to(b.dtype)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def rounded(values, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 values rounded to the nearest of dtype, as float32: triton 3.8's interpreter cuts bfloat16 off instead.
    """
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = values.to(tl.uint32, bitcast=True)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(dtype).to(tl.float32)


@triton.jit
def store(pointers, values, mask, INTERPRETED: tl.constexpr):
    """tl.store of float32 values, rounded to nearest."""
    if INTERPRETED:
        values = rounded(values, pointers.dtype.element_ty, INTERPRETED)
    tl.store(pointers, values, mask=mask)


@triton.jit
def dot_nt(a, a_rows, a_stride, b, b_rows, b_stride, K, a_mask, b_mask, BM: tl.constexpr, BN: tl.constexpr,
           BK: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 [BM, BN] = a[a_rows, :K] @ b[b_rows, :K]^T; rows whose mask is False count as zero."""
    accumulator = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a_tile = tl.load(a + a_rows.to(tl.int64)[:, None] * a_stride + k[None, :],
                         mask=a_mask[:, None] & (k[None, :] < K), other=0.0)
        b_tile = tl.load(b + b_rows.to(tl.int64)[:, None] * b_stride + k[None, :],
                         mask=b_mask[:, None] & (k[None, :] < K), other=0.0)
        accumulator = dot(a_tile, tl.trans(b_tile), accumulator, INTERPRETED)
    return accumulator
