"""linear_logprob in plain torch: logits exist one block of rows and columns at a time, small enough for a CPU's cache.

Letters: C tokens of one chunk, B vocabulary rows of one block, H hidden size.
"""

from __future__ import annotations

import torch

from rl_kernels.linear_logprob.products import math_dtype, multiply, parts

__all__ = ["block", "gradient_block", "statistics"]

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
"""Logits of one block: 4 MB in float32 stays in a CPU's cache; a GPU wants few, large kernels."""


def block_columns(chunk_tokens: int, device: torch.device) -> int:
    """Vocabulary rows of one block when it has chunk_tokens rows."""
    return max(1024, whole_tiles(BLOCK_ELEMENTS.get(device.type, 2**27) // chunk_tokens))


def block(tokens: int, chunk_tokens: int, device: torch.device) -> tuple[int, int]:
    """(tokens, vocabulary rows) of a block of logit gradients."""
    rows = max(1, min(tokens, chunk_tokens))
    return rows, block_columns(rows, device)


def whole_tiles(columns: int) -> int:
    """columns rounded down to a multiple of 128, so that rows of a block start where matrix units can load them."""
    return max(128, columns // 128 * 128)


def statistics(scaled_TH, weight_VH, local_T, *, temperature, with_entropy, chunk_tokens, rounded):
    """(maximum, exp_sum, exp_dot, label_logit), [1, T] each in the math dtype: an online log-sum-exp over blocks.

    exp_sum = sum exp(z - maximum), exp_dot = sum exp(z - maximum) (z - maximum), over this rank's logits z.
    local_T int32: the label's row of weight_VH, or -1; its logit is 0 then.
    """
    tokens, dtype = scaled_TH.shape[0], math_dtype(scaled_TH)
    exp_sum_T, exp_dot_T, label_T = scaled_TH.new_zeros((3, tokens), dtype=dtype).unbind(0)
    max_T = torch.full_like(label_T, torch.finfo(dtype).min / 4)  # finite: a difference with itself is 0
    chunk_tokens = max(1, min(chunk_tokens, tokens))
    width = block_columns(chunk_tokens, scaled_TH.device)
    for first in range(0, weight_VH.shape[0], width):
        weight_BH = weight_VH[first:first + width]
        for start in range(0, tokens, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits_CB = _logits(scaled_TH[rows], weight_BH, temperature, rounded)
            index_C, owned_C = _in_block(local_T[rows], first, weight_BH.shape[0])
            label_C = logits_CB.gather(1, index_C[:, None]).squeeze(1)
            label_T[rows] += torch.where(owned_C, label_C, torch.zeros_like(label_C))
            new_max_C = torch.maximum(max_T[rows], logits_CB.amax(1))
            shifted_CB = logits_CB.sub_(new_max_C[:, None])
            exp_CB = shifted_CB.exp()
            down_C = max_T[rows] - new_max_C
            if with_entropy:
                exp_dot_T[rows] = (exp_dot_T[rows] + down_C * exp_sum_T[rows]) * down_C.exp() \
                    + shifted_CB.mul_(exp_CB).sum(1)
            exp_sum_T[rows] = exp_sum_T[rows] * down_C.exp() + exp_CB.sum(1)
            max_T[rows] = new_max_C
    return max_T[None], exp_sum_T[None], exp_dot_T[None], label_T[None]


def gradient_block(scaled_CH, weight_BH, local_C, lse_C, entropy_C, g_logprob_C, g_entropy_C, *, temperature, rounded):
    """d loss / d (h . w) [C, B] as the parts that products takes. g_entropy_C None: the entropy carries no gradient.

    d loss / d z_j = g_logprob (1[j = label] - p_j) - g_entropy p_j (log p_j + entropy), z = h . w / temperature.
    """
    logp_CB = _logits(scaled_CH, weight_BH, temperature, rounded).sub_(lse_C[:, None])
    grad_CB = logp_CB.exp()
    if g_entropy_C is None:
        grad_CB.mul_(-g_logprob_C[:, None])
    else:
        offset_C = g_logprob_C + g_entropy_C * entropy_C
        grad_CB.mul_(torch.addcmul(offset_C[:, None], logp_CB, g_entropy_C[:, None], out=logp_CB).neg_())
    index_C, owned_C = _in_block(local_C, 0, weight_BH.shape[0])
    term_C = torch.where(owned_C, g_logprob_C, torch.zeros_like(g_logprob_C))
    grad_CB.scatter_add_(1, index_C[:, None], term_C[:, None])
    del logp_CB
    return parts(grad_CB if temperature == 1.0 else grad_CB.div_(temperature), weight_BH.dtype)


def _logits(scaled_CH, weight_BH, temperature, rounded):
    """[C, B] in the math dtype, a buffer of our own."""
    logits_CB = multiply(scaled_CH, weight_BH.T)
    if rounded:
        logits_CB = logits_CB.to(weight_BH.dtype).to(logits_CB.dtype)
    return logits_CB if temperature == 1.0 else logits_CB.div_(temperature)


def _in_block(local_C, first, rows):
    """(int64 row of the block, 0 where the label is elsewhere; bool: the label is in this block)."""
    index_C = local_C.long() - first
    owned_C = (local_C >= 0) & (index_C >= 0) & (index_C < rows)
    return torch.where(owned_C, index_C, torch.zeros_like(index_C)), owned_C
