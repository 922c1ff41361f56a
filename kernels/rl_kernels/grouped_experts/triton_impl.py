"""grouped_experts in Triton: rows are gathered and scattered inside the matrix products, no permuted copy is made.

Letters: T tokens, K choices of a token, N = T * K slots, E experts, H hidden size, F width of an expert.
Forward keeps the two halves before the SwiGLU [N, 2F]; backward makes the activation from them again.
A program computes BM rows of one expert; which, it reads from a table, because the sizes are on the device only. The
columns are the grid's first index: programs that run together share one expert's matrix and few rows, which the L2
cache holds (11.5 MB and 0.5 MB a block at Ling-lite's sizes), so that either comes from memory about once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from rl_kernels.triton_impl import INTERPRETED, dot, store


def tiles(dtype: torch.dtype, *, accumulators: int = 1) -> dict[str, int]:
    """Tile sizes and launch options. Chosen by reasoning for sm_80 and sm_90; no timing stands behind them yet."""
    if INTERPRETED:
        return {"BM": 16, "BN": 16, "BK": 16}
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64 // accumulators, "BK": 32, "num_warps": 4, "num_stages": 2}
    return {"BM": 128, "BN": 128 // accumulators, "BK": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def rows_of_block(table, order, block, num_blocks, choices, BM: tl.constexpr):
    """(expert, or -1 for a block beyond the last; rows [BM]; mask; slot; token)"""
    expert = tl.load(table + block)
    start = tl.load(table + num_blocks + block)
    end = tl.load(table + 2 * num_blocks + block)
    rows = start + tl.arange(0, BM)
    mask = rows < end
    slot = tl.load(order + rows, mask=mask, other=0)
    return expert, rows.to(tl.int64), mask, slot, slot // choices


@triton.jit
def matrix_of(first, offsets, expert, ALIGNED: tl.constexpr):
    """Pointer to the expert's matrix: experts may lie anywhere, as separate parameters do. ALIGNED: by 16 elements."""
    offset = tl.load(offsets + expert)
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return first + offset


@triton.jit
def gate_up_kernel(hidden, gate_up, offsets, weights, order, table, saved, activated, num_blocks, choices, H, F,
                   ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   INTERPRETED: tl.constexpr):
    """saved[row, :2F] = gate and up; activated[row, :F] = silu(gate) * up * weight."""
    expert, rows, mask, slot, token = rows_of_block(table, order, tl.program_id(1), num_blocks, choices, BM)
    if expert >= 0:
        columns = tl.program_id(0) * BN + tl.arange(0, BN)
        inside = columns < F
        matrix = matrix_of(gate_up, offsets, expert, ALIGNED)
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, H, BK):
            k = k0 + tl.arange(0, BK)
            tile = tl.load(hidden + token[:, None] * H + k[None, :], mask=mask[:, None] & (k[None, :] < H), other=0.0)
            where = columns[None, :] * H + k[:, None]
            both = inside[None, :] & (k[:, None] < H)
            gate = dot(tile, tl.load(matrix + where, mask=both, other=0.0), gate, INTERPRETED)
            up = dot(tile, tl.load(matrix + F * H + where, mask=both, other=0.0), up, INTERPRETED)
        weight = tl.load(weights + slot, mask=mask, other=0.0)[:, None]
        stored = mask[:, None] & inside[None, :]
        place = saved + rows[:, None] * 2 * F + columns[None, :]
        store(place, gate, stored, INTERPRETED)
        store(place + F, up, stored, INTERPRETED)
        value = gate * tl.sigmoid(gate) * up * weight
        store(activated + rows[:, None] * F + columns[None, :], value, stored, INTERPRETED)


@triton.jit
def rows_times_matrix(rows, matrix, r, columns, X, Y, row_mask, stride_x, stride_y, BM: tl.constexpr, BN: tl.constexpr,
                      BK: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 [BM, BN] = rows[r, :X] @ matrix[:X, columns], the matrix by its strides."""
    accumulator = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, X, BK):
        k = k0 + tl.arange(0, BK)
        tile = tl.load(rows + r[:, None] * X + k[None, :], mask=row_mask[:, None] & (k[None, :] < X), other=0.0)
        other = tl.load(matrix + k[:, None] * stride_x + columns[None, :] * stride_y,
                        mask=(k[:, None] < X) & (columns[None, :] < Y), other=0.0)
        accumulator = dot(tile, other, accumulator, INTERPRETED)
    return accumulator


@triton.jit
def scatter_kernel(rows_NX, matrices, offsets, order, table, out, num_blocks, choices, X, Y, stride_x, stride_y,
                   ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   INTERPRETED: tl.constexpr):
    """out[slot of row, :Y] = rows[row, :X] @ matrices[expert]."""
    expert, rows, mask, slot, token = rows_of_block(table, order, tl.program_id(1), num_blocks, choices, BM)
    if expert >= 0:
        columns = tl.program_id(0) * BN + tl.arange(0, BN)
        tile = rows_times_matrix(rows_NX, matrix_of(matrices, offsets, expert, ALIGNED), rows, columns, X, Y, mask,
                                 stride_x, stride_y, BM, BN, BK, INTERPRETED)
        store(out + slot[:, None] * Y + columns[None, :], tile, mask[:, None] & (columns[None, :] < Y), INTERPRETED)


@triton.jit
def activation_gradient_kernel(grad_out, down, offsets, saved, weights, order, table, grad_saved, activated,
                               grad_weights, num_blocks, choices, H, F, ALIGNED: tl.constexpr, BM: tl.constexpr,
                               BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr):
    """grad_saved [N, 2F], the weighted activation [N, F] again, and grad_weights [N, column tiles] to be summed."""
    expert, rows, mask, slot, token = rows_of_block(table, order, tl.program_id(1), num_blocks, choices, BM)
    if expert >= 0:
        tile = tl.program_id(0)
        columns = tile * BN + tl.arange(0, BN)
        grad = rows_times_matrix(grad_out, matrix_of(down, offsets, expert, ALIGNED), token, columns, H, F, mask, F, 1,
                                 BM, BN, BK, INTERPRETED)
        both = mask[:, None] & (columns[None, :] < F)
        place = rows[:, None] * 2 * F + columns[None, :]
        gate = tl.load(saved + place, mask=both, other=0.0).to(tl.float32)
        up = tl.load(saved + place + F, mask=both, other=0.0).to(tl.float32)
        weight = tl.load(weights + slot, mask=mask, other=0.0)[:, None]
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        tl.store(grad_weights + slot * tl.num_programs(0) + tile, tl.sum(grad * silu * up, 1), mask=mask)
        store(activated + rows[:, None] * F + columns[None, :], silu * up * weight, both, INTERPRETED)
        grad = grad * weight
        store(grad_saved + place, grad * up * sigmoid * (1.0 + gate - silu), both, INTERPRETED)
        store(grad_saved + place + F, grad * silu, both, INTERPRETED)


@triton.jit
def weight_gradient_kernel(left, right, order, starts, out, choices, X, Y, LEFT_BY_TOKEN: tl.constexpr,
                           BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr):
    """out[expert, :X, :Y] = sum over the expert's rows of left[., :X]^T right[., :Y]; zero for an expert without rows.

    One of the two is indexed by the row's token, the other by the row.
    """
    x = tl.program_id(0) * BM + tl.arange(0, BM)
    y = tl.program_id(1) * BN + tl.arange(0, BN)
    expert = tl.program_id(2)
    end = tl.load(starts + expert + 1)
    accumulator = tl.zeros((BM, BN), tl.float32)
    for r0 in range(tl.load(starts + expert), end, BK):
        rows = (r0 + tl.arange(0, BK)).to(tl.int64)
        mask = rows < end
        token = tl.load(order + rows, mask=mask, other=0) // choices
        left_rows, right_rows = rows, token
        if LEFT_BY_TOKEN:
            left_rows, right_rows = token, rows
        left_tile = tl.load(left + left_rows[None, :] * X + x[:, None], mask=mask[None, :] & (x[:, None] < X),
                            other=0.0)
        right_tile = tl.load(right + right_rows[:, None] * Y + y[None, :], mask=mask[:, None] & (y[None, :] < Y),
                             other=0.0)
        accumulator = dot(left_tile, right_tile, accumulator, INTERPRETED)
    place = out + expert.to(tl.int64) * X * Y + x.to(tl.int64)[:, None] * Y + y[None, :]
    store(place, accumulator, (x[:, None] < X) & (y[None, :] < Y), INTERPRETED)


def block_table(ends_E: torch.Tensor, slots: int, rows_per_block: int) -> torch.Tensor:
    """int32 [3, blocks]: expert (-1: no block), first row and end of each block of at most rows_per_block rows.

    As many blocks as any split of the slots over the experts could need, so that nothing is read back to the host.
    """
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    last_block_E = ((ends_E - starts_E + rows_per_block - 1) // rows_per_block).cumsum(0)
    block = torch.arange(triton.cdiv(slots, rows_per_block) + len(ends_E), device=ends_E.device)
    expert = torch.searchsorted(last_block_E, block, right=True)
    real = expert < len(ends_E)
    expert = expert.clamp(max=len(ends_E) - 1)
    before = torch.cat([last_block_E.new_zeros(1), last_block_E[:-1]])[expert]
    start = starts_E[expert] + (block - before) * rows_per_block
    end = torch.where(real, ends_E[expert], start)
    return torch.stack([torch.where(real, expert, -1), start, end]).to(torch.int32).contiguous()


@lru_cache(maxsize=4096)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [E], copied to the device once: parameters stay where they are from step to step."""
    return torch.tensor(numbers, device=device)


class Experts:
    """One matrix of each expert as the kernels find it: a base tensor and int64 [E] offsets from it, in elements.

    tensors: E contiguous matrices [rows, columns], or one tensor [E, rows, columns].
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...]):
        self.base, self.stacked = tensors[0], tensors[0].dim() == 3
        *_, self.rows, self.columns = self.base.shape
        if self.stacked:
            numbers = tuple(range(0, self.base.numel(), self.rows * self.columns))
        else:
            first, size = self.base.data_ptr(), self.base.element_size()
            numbers = tuple((tensor.data_ptr() - first) // size for tensor in tensors)
        self.offsets = _on_device(numbers, self.base.device)
        self.aligned = all(number % 16 == 0 for number in numbers)

    def gradients(self, grad_ERC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (grad_ERC,) if self.stacked else grad_ERC.unbind(0)


def triton_experts(hidden_TH, gate_up_E2FH, down_EHF, weights_TK, order_N, ends_E) -> torch.Tensor:
    """[T, H]; gate_up and down as one tensor or E; order_N int64 [N], None: a row is its slot and has an expert."""
    every_slot = order_N is None
    if every_slot:
        order_N = torch.arange(weights_TK.numel(), device=hidden_TH.device)
    gate_up, down = ((matrices,) if isinstance(matrices, torch.Tensor) else tuple(matrices)
                     for matrices in (gate_up_E2FH, down_EHF))
    ends_E = ends_E.to(hidden_TH.device)
    table = block_table(ends_E, len(order_N), tiles(hidden_TH.dtype)["BM"])
    return TritonExperts.apply(hidden_TH, weights_TK, order_N, ends_E, table, every_slot, len(gate_up), *gate_up, *down)


class TritonExperts(torch.autograd.Function):
    """hidden [T, H], weights [T, K], order int64 [N], ends int32 [E], table, every_slot: no slot is without an expert,
    tensors of each kind, gate_up, down -> [T, H]."""

    @staticmethod
    def forward(ctx, hidden_TH, weights_TK, order_N, ends_E, table, every_slot, kinds, *matrices):
        hidden_TH, *matrices = (tensor.contiguous() for tensor in (hidden_TH, *matrices))
        gate_up, down = Experts(matrices[:kinds]), Experts(matrices[kinds:])
        choices, slots, (hidden, width) = weights_TK.shape[1], len(order_N), (down.rows, down.columns)
        weights_N = weights_TK.float().contiguous().view(-1)
        saved_N2F = hidden_TH.new_empty(slots, 2 * width)
        activated_NF = hidden_TH.new_empty(slots, width)
        out_NH = (hidden_TH.new_empty if every_slot else hidden_TH.new_zeros)(slots, hidden)
        if slots:
            size = tiles(hidden_TH.dtype, accumulators=2)
            gate_up_kernel[(triton.cdiv(width, size["BN"]), table.shape[1])](
                hidden_TH, gate_up.base, gate_up.offsets, weights_N, order_N, table, saved_N2F, activated_NF,
                table.shape[1], choices, hidden, width, ALIGNED=gate_up.aligned, INTERPRETED=INTERPRETED, **size)
            _scatter(activated_NF, down, order_N, table, choices, out_NH, transposed=True)
        ctx.save_for_backward(hidden_TH, weights_TK, order_N, ends_E, table, saved_N2F, *matrices)
        ctx.every_slot, ctx.kinds = every_slot, kinds
        return _sum_choices(out_NH, choices)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        hidden_TH, weights_TK, order_N, ends_E, table, saved_N2F, *matrices = ctx.saved_tensors
        gate_up, down = Experts(matrices[:ctx.kinds]), Experts(matrices[ctx.kinds:])
        choices, slots, (hidden, width) = weights_TK.shape[1], len(order_N), (down.rows, down.columns)
        if not slots:
            zeros = [torch.zeros_like(tensor) for tensor in (hidden_TH, weights_TK, *matrices)]
            return *zeros[:2], None, None, None, None, None, *zeros[2:]
        grad_TH = grad_TH.contiguous()
        size = tiles(hidden_TH.dtype, accumulators=2)  # gate, up and the gradient are in registers together
        column_tiles = triton.cdiv(width, size["BN"])
        grad_saved_N2F, activated_NF = torch.empty_like(saved_N2F), saved_N2F.new_empty(slots, width)
        grad_weights_NC = torch.zeros(slots, column_tiles, device=grad_TH.device)
        activation_gradient_kernel[(column_tiles, table.shape[1])](
            grad_TH, down.base, down.offsets, saved_N2F, weights_TK.float().contiguous().view(-1), order_N, table,
            grad_saved_N2F, activated_NF, grad_weights_NC, table.shape[1], choices, hidden, width,
            ALIGNED=down.aligned, INTERPRETED=INTERPRETED, **size)
        grad_NH = (hidden_TH.new_empty if ctx.every_slot else hidden_TH.new_zeros)(slots, hidden)
        _scatter(grad_saved_N2F, gate_up, order_N, table, choices, grad_NH, transposed=False)
        grad_gate_up = _weight_gradient(grad_saved_N2F, hidden_TH, order_N, ends_E, choices, left_by_token=False)
        grad_down = _weight_gradient(grad_TH, activated_NF, order_N, ends_E, choices, left_by_token=True)
        return (_sum_choices(grad_NH, choices), grad_weights_NC.sum(1).view_as(weights_TK).to(weights_TK.dtype),
                None, None, None, None, None, *gate_up.gradients(grad_gate_up), *down.gradients(grad_down))


def _sum_choices(slots_NH, choices):
    return slots_NH if choices == 1 else slots_NH.view(-1, choices, slots_NH.shape[1]).sum(1)


def _scatter(rows_NX, experts: Experts, order_N, table, choices, out_NY, *, transposed: bool):
    """out[slot] = rows @ matrix of its expert, or @ its transpose."""
    size, inner, outer, strides = tiles(rows_NX.dtype), experts.rows, experts.columns, (experts.columns, 1)
    if transposed:
        inner, outer, strides = outer, inner, strides[::-1]
    scatter_kernel[(triton.cdiv(outer, size["BN"]), table.shape[1])](
        rows_NX, experts.base, experts.offsets, order_N, table, out_NY, table.shape[1], choices, inner, outer, *strides,
        ALIGNED=experts.aligned, INTERPRETED=INTERPRETED, **size)


def _weight_gradient(left, right, order_N, ends_E, choices, *, left_by_token):
    size, starts = tiles(left.dtype), torch.cat([ends_E.new_zeros(1), ends_E])
    out = left.new_empty(len(ends_E), left.shape[1], right.shape[1])
    grid = (triton.cdiv(left.shape[1], size["BM"]), triton.cdiv(right.shape[1], size["BN"]), len(ends_E))
    weight_gradient_kernel[grid](
        left, right, order_N, starts, out, choices, left.shape[1], right.shape[1], LEFT_BY_TOKEN=left_by_token,
        INTERPRETED=INTERPRETED, **size)
    return out
