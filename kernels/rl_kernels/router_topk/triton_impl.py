"""router_topk in Triton: one program holds the logits of BM tokens for all experts, from the product to the sums.

Letters: T tokens, E experts (EP: the next power of two), K choices, H hidden size, P programs.
Forward keeps the logits, fp32 [T, E]; sums leave as one partial per program, so equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from rl_kernels.triton_impl import INTERPRETED, store

LOWEST = -1e30  # the logit of the columns that pad E to a power of two
SPLITS = 8
"""Partial sums of the weight's gradient over tokens; H / BN programs alone would leave a GPU idle."""


def tiles(padded: int) -> dict[str, int]:
    """Tile sizes and launch options for that many columns. Chosen by reasoning for sm_80 and sm_90, and so that ptxas
    spills nothing; no timing stands behind them yet."""
    if INTERPRETED:
        return {"BM": 16, "BK": 16}
    return {"BM": 32 if padded <= 64 else 16, "BK": 64 if padded <= 64 else 32, "num_warps": 4 if padded <= 64 else 8,
            "num_stages": 3}


@triton.jit
def product(a, b, accumulator, WIDEN: tl.constexpr):
    """accumulator + a @ b. Products of two bfloat16 are exact in the float32 sum; float32 takes three tf32 passes."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


@triton.jit
def forward_kernel(hidden, weight, replayed, real, logits_out, indices, weights, sums, T, E, H,
                   K: tl.constexpr, REPLAY: tl.constexpr, NORMALIZE: tl.constexpr, WIDEN: tl.constexpr,
                   LOWEST: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """sums[program, 0..3, EP]: counts, probabilities, and in column 0 logsumexp^2 and entropy."""
    program = tl.program_id(0)
    rows = (program * BM + tl.arange(0, BM)).to(tl.int64)
    experts = tl.arange(0, EP)
    row_mask, expert_mask = rows < T, experts < E
    both = row_mask[:, None] & expert_mask[None, :]
    logits = tl.zeros((BM, EP), tl.float32)
    for k0 in range(0, H, BK):
        h = k0 + tl.arange(0, BK)
        a = tl.load(hidden + rows[:, None] * H + h[None, :], mask=row_mask[:, None] & (h[None, :] < H), other=0.0)
        b = tl.load(weight + experts[None, :] * H + h[:, None], mask=expert_mask[None, :] & (h[:, None] < H), other=0.0)
        logits = product(a, b, logits, WIDEN)
    tl.store(logits_out + rows[:, None] * E + experts[None, :], logits, mask=both)
    logits = tl.where(expert_mask[None, :], logits, LOWEST)

    order = tl.full((BM, EP), K, tl.int32)  # which choice this expert is, K: none
    # NaN counts as the lowest expert, and a column of padding as lower still: a choice is always K different experts
    left = tl.where(expert_mask[None, :], tl.where(logits > LOWEST, logits, LOWEST), 2 * LOWEST)
    for i in tl.static_range(K):
        if REPLAY:
            choice = tl.load(replayed + rows * K + i, mask=row_mask, other=0).to(tl.int32)
        else:
            choice = tl.argmax(left, 1)
        is_choice = experts[None, :] == choice[:, None]
        order = tl.where(is_choice, i, order)
        left = tl.where(is_choice, 4 * LOWEST, left)
        tl.store(indices + rows * K + i, choice.to(tl.int64), mask=row_mask)
    chosen = order < K
    maximum = tl.max(logits, 1)
    exp = tl.exp(logits - maximum[:, None])
    exp_sum = tl.sum(exp, 1)
    lse = maximum + tl.log(exp_sum)
    probs = exp / exp_sum[:, None]
    values = probs
    if NORMALIZE:
        among = tl.where(chosen, logits, LOWEST)
        exp = tl.where(chosen, tl.exp(among - tl.max(among, 1)[:, None]), 0.0)
        values = exp / tl.sum(exp, 1)[:, None]
    for i in tl.static_range(K):
        tl.store(weights + rows * K + i, tl.sum(tl.where(order == i, values, 0.0), 1), mask=row_mask)

    is_real = tl.load(real + rows, mask=row_mask, other=0) != 0
    place = sums + program * 4 * EP + experts
    tl.store(place, tl.sum(tl.where(chosen & is_real[:, None], 1.0, 0.0), 0))
    tl.store(place + EP, tl.sum(tl.where(is_real[:, None], probs, 0.0), 0))
    z = tl.sum(tl.where(is_real, lse * lse, 0.0), 0)
    entropy = tl.sum(tl.where(is_real, lse - tl.sum(probs * logits, 1), 0.0), 0)
    tl.store(place + 2 * EP, tl.where(experts == 0, z, 0.0))
    tl.store(place + 3 * EP, tl.where(experts == 0, entropy, 0.0))


@triton.jit
def backward_kernel(weight, real, logits, indices, weights, grad_weights, grad_probs, grad_z, grad_logits, grad_hidden,
                    T, E, H, K: tl.constexpr, NORMALIZE: tl.constexpr, LOWEST: tl.constexpr, EP: tl.constexpr,
                    BM: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr):
    """grad_logits fp32 [T, E], and grad_hidden = grad_logits @ weight."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    experts = tl.arange(0, EP)
    row_mask, expert_mask = rows < T, experts < E
    both = row_mask[:, None] & expert_mask[None, :]
    place = rows[:, None] * E + experts[None, :]
    logit = tl.load(logits + place, mask=both, other=LOWEST)
    maximum = tl.max(logit, 1)
    exp = tl.exp(logit - maximum[:, None])
    exp_sum = tl.sum(exp, 1)
    lse = maximum + tl.log(exp_sum)
    probs = exp / exp_sum[:, None]

    from_choices = tl.zeros((BM, EP), tl.float32)
    inner = tl.zeros((BM,), tl.float32)
    if NORMALIZE:
        for i in tl.static_range(K):
            inner += tl.load(weights + rows * K + i, mask=row_mask, other=0.0) \
                * tl.load(grad_weights + rows * K + i, mask=row_mask, other=0.0)
    for i in tl.static_range(K):
        g = tl.load(grad_weights + rows * K + i, mask=row_mask, other=0.0)
        if NORMALIZE:
            g = tl.load(weights + rows * K + i, mask=row_mask, other=0.0) * (g - inner)
        choice = tl.load(indices + rows * K + i, mask=row_mask, other=0).to(tl.int32)
        from_choices += tl.where(experts[None, :] == choice[:, None], g[:, None], 0.0)

    is_real = (tl.load(real + rows, mask=row_mask, other=0) != 0)[:, None]
    grad_p = tl.where(is_real, tl.load(grad_probs + experts, mask=expert_mask, other=0.0)[None, :], 0.0)
    slope = tl.where(is_real, 2.0 * tl.load(grad_z) * lse[:, None], 0.0)
    if not NORMALIZE:
        grad_p += from_choices
    grad = probs * (grad_p - tl.sum(probs * grad_p, 1)[:, None] + slope)
    if NORMALIZE:
        grad += from_choices
    # columns of padding are zero by their probability
    tl.store(grad_logits + place, grad, mask=both)
    for k0 in range(0, H, BK):
        h = k0 + tl.arange(0, BK)
        b = tl.load(weight + experts[:, None] * H + h[None, :], mask=expert_mask[:, None] & (h[None, :] < H), other=0.0)
        tile = product(grad, b, tl.zeros((BM, BK), tl.float32), True)
        store(grad_hidden + rows[:, None] * H + h[None, :], tile, row_mask[:, None] & (h[None, :] < H), INTERPRETED)


@triton.jit
def weight_gradient_kernel(hidden, grad_logits, out, T, E, H, rows_per_split, EP: tl.constexpr, BM: tl.constexpr,
                           BK: tl.constexpr):
    """out[split, E, H] = grad_logits[rows of the split]^T @ hidden."""
    h = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    experts = tl.arange(0, EP)
    accumulator = tl.zeros((EP, BK), tl.float32)
    end = tl.minimum((split + 1) * rows_per_split, T)
    for start in range(split * rows_per_split, end, BM):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        row_mask = rows < end
        a = tl.load(grad_logits + rows[None, :] * E + experts[:, None], mask=row_mask[None, :] & (experts[:, None] < E),
                    other=0.0)
        b = tl.load(hidden + rows[:, None] * H + h[None, :], mask=row_mask[:, None] & (h[None, :] < H), other=0.0)
        accumulator = product(a, b, accumulator, True)
    tl.store(out + split.to(tl.int64) * E * H + experts[:, None] * H + h[None, :], accumulator,
             mask=(experts[:, None] < E) & (h[None, :] < H))


class TritonRouter(torch.autograd.Function):
    """-> (weights_TK, indices_TK, counts_E, prob_sums_E, z_sum, entropy_sum)"""

    @staticmethod
    def forward(ctx, hidden_TH, weight_EH, replayed_TK, real_T, k, normalize):
        hidden_TH, weight_EH = hidden_TH.contiguous(), weight_EH.contiguous()
        (tokens, hidden), experts = hidden_TH.shape, len(weight_EH)
        padded = _padded(experts)
        size = tiles(padded)
        programs = triton.cdiv(tokens, size["BM"])
        real_T = hidden_TH.new_ones(tokens, dtype=torch.bool) if real_T is None else real_T.contiguous()
        empty = hidden_TH.new_empty
        logits_TE, weights_TK = empty(tokens, experts, dtype=torch.float32), empty(tokens, k, dtype=torch.float32)
        indices_TK, sums = empty(tokens, k, dtype=torch.int64), empty(programs, 4, padded, dtype=torch.float32)
        if tokens:
            forward_kernel[(programs,)](
                hidden_TH, weight_EH, indices_TK if replayed_TK is None else replayed_TK.contiguous(), real_T,
                logits_TE, indices_TK, weights_TK, sums, tokens, experts, hidden, K=k, REPLAY=replayed_TK is not None,
                NORMALIZE=normalize, WIDEN=INTERPRETED or hidden_TH.dtype != weight_EH.dtype, LOWEST=LOWEST, EP=padded,
                **size)
        ctx.save_for_backward(hidden_TH, weight_EH, real_T, logits_TE, indices_TK, weights_TK)
        ctx.normalize = normalize
        counts_E, prob_sums_E = (row[:experts].clone() for row in sums[:, :2].sum(0))
        z_sum, entropy_sum = (value.clone() for value in sums[:, 2:, 0].sum(0))
        ctx.mark_non_differentiable(indices_TK, counts_E, entropy_sum)
        return weights_TK, indices_TK, counts_E, prob_sums_E, z_sum, entropy_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weights_TK, _indices, _counts, grad_probs_E, grad_z, _entropy):
        hidden_TH, weight_EH, real_T, logits_TE, indices_TK, weights_TK = ctx.saved_tensors
        (tokens, hidden), experts, grad_logits_TE = hidden_TH.shape, len(weight_EH), torch.empty_like(logits_TE)
        padded = _padded(experts)
        size = tiles(padded)
        grad_hidden_TH = torch.empty_like(hidden_TH)
        if not tokens:
            return grad_hidden_TH, torch.zeros_like(weight_EH), None, None, None, None
        backward_kernel[(triton.cdiv(tokens, size["BM"]),)](
            weight_EH, real_T, logits_TE, indices_TK, weights_TK, grad_weights_TK.contiguous(),
            grad_probs_E.contiguous(), grad_z, grad_logits_TE, grad_hidden_TH, tokens, experts, hidden,
            K=indices_TK.shape[1], NORMALIZE=ctx.normalize, LOWEST=LOWEST, EP=padded, INTERPRETED=INTERPRETED, **size)
        splits = max(1, min(SPLITS, tokens // size["BM"]))
        per_split = triton.cdiv(triton.cdiv(tokens, splits), size["BM"]) * size["BM"]
        partial_SEH = hidden_TH.new_empty(splits, experts, hidden, dtype=torch.float32)
        weight_gradient_kernel[(triton.cdiv(hidden, size["BK"]), splits)](
            hidden_TH, grad_logits_TE, partial_SEH, tokens, experts, hidden, per_split, EP=padded, **size)
        return grad_hidden_TH, partial_SEH.sum(0).to(weight_EH.dtype), None, None, None, None


def _padded(experts: int) -> int:
    return max(16, triton.next_power_of_2(experts))
