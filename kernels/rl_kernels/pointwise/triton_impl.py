"""weighted_swiglu and rotate in Triton. Every tensor is contiguous but for the heads.

Letters: N rows, F width, T tokens, H heads, D head dimension, d rotated dimensions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rl_kernels.triton_impl import INTERPRETED, store

TILE = {"BM": 16, "BN": 16} if INTERPRETED else {"BM": 8, "BN": 256, "num_warps": 4}
"""Rows and columns of a tile. Chosen by reasoning: 2,048 elements are 16 for each thread."""


@triton.jit
def swiglu_kernel(gate_up, weights, out, N, F, WEIGHTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  INTERPRETED: tl.constexpr):
    """out[row, :F] = silu(gate) * up * weight."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask = rows < N
    mask = row_mask[:, None] & (columns[None, :] < F)
    place = gate_up + rows.to(tl.int64)[:, None] * 2 * F + columns[None, :]
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * tl.load(place + F, mask=mask, other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(weights + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    store(out + rows.to(tl.int64)[:, None] * F + columns[None, :], value, mask, INTERPRETED)


@triton.jit
def swiglu_gradient_kernel(grad, gate_up, weights, grad_gate_up, grad_weights, N, F, WEIGHTED: tl.constexpr,
                           BM: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr):
    """grad_gate_up[row, :2F] and, over all of the row, grad_weights[row]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < N
    weight = tl.full((BM,), 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(weights + rows, mask=row_mask, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BM,), tl.float32)
    begin = rows.to(tl.int64)[:, None] * F
    for start in range(0, F, BN):
        columns = start + tl.arange(0, BN)
        mask = row_mask[:, None] & (columns[None, :] < F)
        both = 2 * begin + columns[None, :]
        upstream = tl.load(grad + begin + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + both, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + both + F, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        weight_sum += tl.sum(upstream * silu * up, 1)
        upstream *= weight[:, None]
        store(grad_gate_up + both, upstream * up * sigmoid * (1.0 + gate - silu), mask, INTERPRETED)
        store(grad_gate_up + both + F, upstream * silu, mask, INTERPRETED)
    if WEIGHTED:
        tl.store(grad_weights + rows, weight_sum, mask=row_mask)


@triton.jit
def rotation_kernel(heads, cosine, sine, out, rows_in_all, H, stride_t, stride_h, d, sign, D: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr):
    """out[row, :D], contiguous; a row is one head of one token. BN: at least d / 2 and D - d, a power of two."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    half = tl.arange(0, BN)
    row_mask = rows < rows_in_all
    token = (rows // H).to(tl.int64)
    source = heads + (token * stride_t + (rows % H) * stride_h)[:, None]
    target = out + rows.to(tl.int64)[:, None] * D
    mask = row_mask[:, None] & (half[None, :] < d // 2)
    first = tl.load(source + half[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + d // 2 + half[None, :], mask=mask, other=0.0).to(tl.float32)
    angle = token[:, None] * d + half[None, :]
    cos = tl.load(cosine + angle, mask=mask, other=0.0)
    sin = tl.load(sine + angle, mask=mask, other=0.0) * sign
    store(target + half[None, :], first * cos - second * sin, mask, INTERPRETED)
    store(target + d // 2 + half[None, :], second * cos + first * sin, mask, INTERPRETED)
    rest = row_mask[:, None] & (half[None, :] < D - d)
    kept = tl.load(source + d + half[None, :], mask=rest, other=0.0).to(tl.float32)
    store(target + d + half[None, :], kept, rest, INTERPRETED)


def swiglu(gate_up_N2F, weights_N1):
    """[N, F]"""
    (rows, both), out_NF = gate_up_N2F.shape, gate_up_N2F.new_empty(len(gate_up_N2F), gate_up_N2F.shape[1] // 2)
    if rows:
        swiglu_kernel[(triton.cdiv(rows, TILE["BM"]), triton.cdiv(both // 2, TILE["BN"]))](
            gate_up_N2F, gate_up_N2F if weights_N1 is None else weights_N1, out_NF, rows, both // 2,
            WEIGHTED=weights_N1 is not None, INTERPRETED=INTERPRETED, **TILE)
    return out_NF


def swiglu_gradients(grad_NF, gate_up_N2F, weights_N1, grad_gate_up_N2F, grad_weights_N1):
    """Fills the last two."""
    rows, both = gate_up_N2F.shape
    weighted = weights_N1 is not None
    if rows:
        swiglu_gradient_kernel[(triton.cdiv(rows, TILE["BM"]),)](
            grad_NF, gate_up_N2F, weights_N1 if weighted else gate_up_N2F, grad_gate_up_N2F, grad_weights_N1, rows,
            both // 2, WEIGHTED=weighted, INTERPRETED=INTERPRETED, **TILE)


def rotated(heads_THD, cosine_T1d, sine_T1d, back):
    """[T, H, D], contiguous. heads: any strides but the last, which is 1."""
    (tokens, heads, dim), turned = heads_THD.shape, cosine_T1d.shape[-1]
    out_THD = heads_THD.new_empty(heads_THD.shape)
    if out_THD.numel():
        rotation_kernel[(triton.cdiv(tokens * heads, TILE["BM"]),)](
            heads_THD, cosine_T1d, sine_T1d, out_THD, tokens * heads, heads, heads_THD.stride(0), heads_THD.stride(1),
            turned, -1.0 if back else 1.0, D=dim, INTERPRETED=INTERPRETED,
            **{**TILE, "BN": triton.next_power_of_2(max(turned // 2, dim - turned))})
    return out_THD
