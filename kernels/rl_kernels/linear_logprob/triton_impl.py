"""linear_logprob in Triton: logits exist as tiles in registers; forward leaves four numbers per token and split.

Letters: T tokens, V vocabulary rows of this rank, H hidden size, S splits of the vocabulary, B columns of one block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rl_kernels.triton_impl import INTERPRETED, dot_nt

LOWEST = -1e30  # instead of -inf: LOWEST - LOWEST and LOWEST * 0 are numbers


def tiles(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options. Chosen by reasoning for sm_80 and sm_90; no timing stands behind them yet."""
    if INTERPRETED:
        return {"BM": 16, "BN": 16, "BK": 16}
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


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
        logits = logits * inverse_temperature
        is_label = columns[None, :] == label[:, None]
        label_logit += tl.sum(tl.where(is_label & inside[None, :], logits, 0.0), 1)
        new_maximum = tl.maximum(maximum, tl.max(tl.where(inside[None, :], logits, LOWEST), 1))
        shifted = tl.where(inside[None, :], logits - new_maximum[:, None], 0.0)
        exp = tl.where(inside[None, :], tl.exp(shifted), 0.0)
        down = maximum - new_maximum
        if ENTROPY:
            exp_dot = (exp_dot + down * exp_sum) * tl.exp(down) + tl.sum(exp * shifted, 1)
        exp_sum = exp_sum * tl.exp(down) + tl.sum(exp, 1)
        maximum = new_maximum
    place = out + split * T + rows
    tl.store(place, maximum, mask=row_mask)
    tl.store(place + splits * T, exp_sum, mask=row_mask)
    tl.store(place + 2 * splits * T, exp_dot, mask=row_mask)
    tl.store(place + 3 * splits * T, label_logit, mask=row_mask)


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
    logp = logits * inverse_temperature - tl.load(lse + rows, mask=row_mask, other=0.0)[:, None]
    g_logprob = tl.load(grad_logprob + rows, mask=row_mask, other=0.0)[:, None]
    slope = g_logprob
    if ENTROPY:
        g_entropy = tl.load(grad_entropy + rows, mask=row_mask, other=0.0)[:, None]
        slope = g_logprob + g_entropy * (logp + tl.load(entropy + rows, mask=row_mask, other=0.0)[:, None])
    is_label = columns[None, :] == tl.load(local + rows, mask=row_mask, other=-1)[:, None]
    gradient = tl.where(is_label, g_logprob, 0.0) - tl.exp(logp) * slope
    mask = row_mask[:, None] & column_mask[None, :]
    place = out + rows.to(tl.int64)[:, None] * B + columns[None, :]
    tl.store(place, gradient * inverse_temperature, mask=mask)


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


def gradient_block(scaled_CH, weight_BH, local_C, lse_C, entropy_C, g_logprob_C, g_entropy_C, *, temperature, rounded):
    """d loss / d (h . w), float32 [C, B]. g_entropy_C None: the entropy carries no gradient."""
    del rounded
    (tokens, hidden), columns, size = scaled_CH.shape, weight_BH.shape[0], tiles(scaled_CH.dtype)
    out = torch.empty(tokens, columns, dtype=torch.float32, device=scaled_CH.device)
    has_entropy = g_entropy_C is not None
    gradient_kernel[(triton.cdiv(columns, size["BN"]), triton.cdiv(tokens, size["BM"]))](
        scaled_CH.contiguous(), weight_BH.contiguous(), local_C, lse_C, entropy_C if has_entropy else lse_C,
        g_logprob_C, g_entropy_C if has_entropy else lse_C, out, tokens, columns, hidden, 1.0 / temperature,
        ENTROPY=has_entropy, INTERPRETED=INTERPRETED, **size)
    return out
