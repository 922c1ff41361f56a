"""linear_logprob in Triton: logits exist as tiles in registers; forward leaves four numbers per token and split.

At the end the kernels of "fused" (fused.py), which find the logits of one block in memory.
Letters: T tokens, V vocabulary rows of this rank, H hidden size, S splits of the vocabulary, C tokens and B columns of
one block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rl_kernels.linear_logprob.chunked import whole_tiles
from rl_kernels.linear_logprob.products import parts
from rl_kernels.triton_impl import INTERPRETED, dot_nt, rounded, store

BLOCK_ELEMENTS = 2**26
"""Gradients of one block of logits that "triton" holds: 256 MB, and as much for their two 16-bit parts."""
LOWEST = -1e30  # instead of -inf: LOWEST - LOWEST and LOWEST * 0 are numbers


def tiles(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options. Chosen by reasoning for sm_80 and sm_90; no timing stands behind them yet."""
    if INTERPRETED:
        return {"BM": 16, "BN": 16, "BK": 16}
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def taken_in(logits, inside, is_label, maximum, exp_sum, exp_dot, label_logit, ENTROPY: tl.constexpr,
             LOWEST: tl.constexpr):
    """(maximum, exp_sum, exp_dot, label_logit) of each row after one more tile of its logits: an online log-sum-exp."""
    label_logit += tl.sum(tl.where(is_label & inside, logits, 0.0), 1)
    new_maximum = tl.maximum(maximum, tl.max(tl.where(inside, logits, LOWEST), 1))
    shifted = tl.where(inside, logits - new_maximum[:, None], 0.0)
    exp = tl.where(inside, tl.exp(shifted), 0.0)
    down = maximum - new_maximum
    if ENTROPY:
        exp_dot = (exp_dot + down * exp_sum) * tl.exp(down) + tl.sum(exp * shifted, 1)
    exp_sum = exp_sum * tl.exp(down) + tl.sum(exp, 1)
    return new_maximum, exp_sum, exp_dot, label_logit


@triton.jit
def store_statistics(place, stride, mask, maximum, exp_sum, exp_dot, label_logit):
    tl.store(place, maximum, mask=mask)
    tl.store(place + stride, exp_sum, mask=mask)
    tl.store(place + 2 * stride, exp_dot, mask=mask)
    tl.store(place + 3 * stride, label_logit, mask=mask)


@triton.jit
def gradient_of(logits, columns, rows, row_mask, local, lse, entropy, grad_logprob, grad_entropy, inverse_temperature,
                ENTROPY: tl.constexpr):
    """d loss / d (logit * temperature) of one tile."""
    logp = logits * inverse_temperature - tl.load(lse + rows, mask=row_mask, other=0.0)[:, None]
    g_logprob = tl.load(grad_logprob + rows, mask=row_mask, other=0.0)[:, None]
    slope = g_logprob
    if ENTROPY:
        g_entropy = tl.load(grad_entropy + rows, mask=row_mask, other=0.0)[:, None]
        slope = g_logprob + g_entropy * (logp + tl.load(entropy + rows, mask=row_mask, other=0.0)[:, None])
    is_label = columns[None, :] == tl.load(local + rows, mask=row_mask, other=-1)[:, None]
    return (tl.where(is_label, g_logprob, 0.0) - tl.exp(logp) * slope) * inverse_temperature


@triton.jit
def statistics_kernel(hidden, weight, local, out, T, V, H, inverse_temperature, columns_per_split, splits,
                      ENTROPY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                      LOWEST: tl.constexpr, INTERPRETED: tl.constexpr):
    """out[0..3, split, rows]: maximum, sum of exp, sum of exp * (logit - maximum), the label's logit or 0.

    A program holds BM rows and walks over one split of the vocabulary: an online log-sum-exp.
    """
    split = tl.program_id(0)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    row_mask = rows < T
    label = tl.load(local + rows, mask=row_mask, other=-1)
    maximum = tl.full((BM,), LOWEST, tl.float32)
    exp_sum = tl.zeros((BM,), tl.float32)
    exp_dot = tl.zeros((BM,), tl.float32)
    label_logit = tl.zeros((BM,), tl.float32)
    end = tl.minimum((split + 1) * columns_per_split, V)
    for start in range(split * columns_per_split, end, BN):
        columns = start + tl.arange(0, BN)
        inside = columns < end
        logits = dot_nt(hidden, rows, H, weight, columns, H, H, row_mask, inside, BM, BN, BK, INTERPRETED)
        maximum, exp_sum, exp_dot, label_logit = taken_in(
            logits * inverse_temperature, inside[None, :], columns[None, :] == label[:, None], maximum, exp_sum,
            exp_dot, label_logit, ENTROPY, LOWEST)
    store_statistics(out + split * T + rows, splits * T, row_mask, maximum, exp_sum, exp_dot, label_logit)


@triton.jit
def gradient_kernel(hidden, weight, local, lse, entropy, grad_logprob, grad_entropy, out, T, B, H, inverse_temperature,
                    ENTROPY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    INTERPRETED: tl.constexpr):
    """out[T, B] = d loss / d (logit * temperature) of one block of columns, from logits made again.

    Columns are the grid's first index: the block's part of the weight stays in the L2 cache, hidden passes by once.
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    row_mask, column_mask = rows < T, columns < B
    logits = dot_nt(hidden, rows, H, weight, columns, H, H, row_mask, column_mask, BM, BN, BK, INTERPRETED)
    gradient = gradient_of(logits, columns, rows, row_mask, local, lse, entropy, grad_logprob, grad_entropy,
                           inverse_temperature, ENTROPY)
    mask = row_mask[:, None] & column_mask[None, :]
    place = out + rows.to(tl.int64)[:, None] * B + columns[None, :]
    tl.store(place, gradient, mask=mask)


def statistics(scaled_TH, weight_VH, local_T, *, temperature, with_entropy, chunk_tokens, rounded):
    """(maximum, exp_sum, exp_dot, label_logit), fp32 [S, T] each.

    At few tokens S splits keep a GPU's units busy; at many, 4 of them, first in the grid, keep the rows that run
    at once to 33 blocks, 17 MB at H = 2048, which the L2 cache holds while all of the weight passes by.
    """
    del chunk_tokens, rounded  # tiles need no chunks, and op.py refuses rounded logits
    tokens, hidden = scaled_TH.shape
    vocab, size = weight_VH.shape[0], tiles(scaled_TH.dtype)
    splits = 2 if INTERPRETED else max(4, min(16, 264 * size["BM"] // max(1, tokens)))
    per_split = triton.cdiv(triton.cdiv(vocab, splits), size["BN"]) * size["BN"]
    out = torch.empty(4, splits, tokens, dtype=torch.float32, device=scaled_TH.device)
    if tokens:
        statistics_kernel[(splits, triton.cdiv(tokens, size["BM"]))](
            scaled_TH.contiguous(), weight_VH.contiguous(), local_T, out, tokens, vocab, hidden, 1.0 / temperature,
            per_split, splits, ENTROPY=with_entropy, LOWEST=LOWEST, INTERPRETED=INTERPRETED, **size)
    return out.unbind(0)


def block(tokens: int, chunk_tokens: int, device: torch.device) -> tuple[int, int]:
    """(tokens, vocabulary rows) of a block of logit gradients."""
    rows = max(1, min(tokens, BLOCK_ELEMENTS // 2048))
    return rows, whole_tiles(BLOCK_ELEMENTS // rows)


def gradient_block(scaled_CH, weight_BH, local_C, lse_C, entropy_C, g_logprob_C, g_entropy_C, *, temperature, rounded):
    """d loss / d (h . w) [C, B] as the parts that products takes. g_entropy_C None: the entropy carries no gradient."""
    del rounded
    (tokens, hidden), columns, size = scaled_CH.shape, weight_BH.shape[0], tiles(scaled_CH.dtype)
    out = torch.empty(tokens, columns, dtype=torch.float32, device=scaled_CH.device)
    has_entropy = g_entropy_C is not None
    gradient_kernel[(triton.cdiv(columns, size["BN"]), triton.cdiv(tokens, size["BM"]))](
        scaled_CH.contiguous(), weight_BH.contiguous(), local_C, lse_C, entropy_C if has_entropy else lse_C,
        g_logprob_C, g_entropy_C if has_entropy else lse_C, out, tokens, columns, hidden, 1.0 / temperature,
        ENTROPY=has_entropy, INTERPRETED=INTERPRETED, **size)
    return parts(out, weight_BH.dtype)


BLOCK = {"BM": 4, "BN": 16} if INTERPRETED else {"BM": 4, "BN": 1024, "num_warps": 8}
"""Rows and columns of a tile of logits that lie in memory. Chosen by reasoning."""


@triton.jit
def block_statistics_kernel(logits, local, out, C, B, inverse_temperature, ENTROPY: tl.constexpr, BM: tl.constexpr,
                            BN: tl.constexpr, LOWEST: tl.constexpr):
    """out[0..3, rows] of the float32 logits [C, B], as statistics_kernel's."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < C
    label = tl.load(local + rows, mask=row_mask, other=-1)
    maximum = tl.full((BM,), LOWEST, tl.float32)
    exp_sum = tl.zeros((BM,), tl.float32)
    exp_dot = tl.zeros((BM,), tl.float32)
    label_logit = tl.zeros((BM,), tl.float32)
    for start in range(0, B, BN):
        columns = start + tl.arange(0, BN)
        inside = row_mask[:, None] & (columns[None, :] < B)
        tile = tl.load(logits + rows.to(tl.int64)[:, None] * B + columns[None, :], mask=inside, other=0.0)
        maximum, exp_sum, exp_dot, label_logit = taken_in(
            tile * inverse_temperature, inside, columns[None, :] == label[:, None], maximum, exp_sum, exp_dot,
            label_logit, ENTROPY, LOWEST)
    store_statistics(out + rows, C, row_mask, maximum, exp_sum, exp_dot, label_logit)


@triton.jit
def block_gradient_kernel(logits, local, lse, entropy, grad_logprob, grad_entropy, high, low, C, B, inverse_temperature,
                          ENTROPY: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                          INTERPRETED: tl.constexpr):
    """The gradient of the float32 logits [C, B] as `high` or, with two PARTS, as the sum of `high` and `low`."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask = rows < C
    mask = row_mask[:, None] & (columns[None, :] < B)
    place = rows.to(tl.int64)[:, None] * B + columns[None, :]
    gradient = gradient_of(tl.load(logits + place, mask=mask, other=0.0), columns, rows, row_mask, local, lse, entropy,
                           grad_logprob, grad_entropy, inverse_temperature, ENTROPY)
    if PARTS == 2:
        first = rounded(gradient, high.dtype.element_ty, INTERPRETED)
        store(low + place, gradient - first, mask, INTERPRETED)
        gradient = first
    store(high + place, gradient, mask, INTERPRETED)


def block_statistics(logits_CB, local_C, inverse_temperature, with_entropy):
    """fp32 [4, C] of float32 logits before the temperature (fused.py)."""
    tokens, columns = logits_CB.shape
    out = torch.empty(4, tokens, dtype=torch.float32, device=logits_CB.device)
    if tokens:
        block_statistics_kernel[(triton.cdiv(tokens, BLOCK["BM"]),)](
            logits_CB, local_C, out, tokens, columns, inverse_temperature, ENTROPY=with_entropy, LOWEST=LOWEST, **BLOCK)
    return out


def block_gradients(logits_CB, local_C, lse_C, entropy_C, g_logprob_C, g_entropy_C, inverse_temperature, found):
    """Fills `found`, one float32 [C, B] or two of a 16-bit type (fused.py)."""
    tokens, columns = logits_CB.shape
    has_entropy = g_entropy_C is not None
    if tokens:
        block_gradient_kernel[(triton.cdiv(tokens, BLOCK["BM"]), triton.cdiv(columns, BLOCK["BN"]))](
            logits_CB, local_C, lse_C, entropy_C if has_entropy else lse_C, g_logprob_C,
            g_entropy_C if has_entropy else lse_C, found[0], found[-1], tokens, columns, inverse_temperature,
            ENTROPY=has_entropy, PARTS=len(found), INTERPRETED=INTERPRETED, **BLOCK)
