"""linear_logprob with torch's products and one Triton kernel for all that follows one.

As "chunked", logits exist one block at a time. A product writes a block and a kernel reads it once, where plain torch
reads and writes it some ten times. The kernels are operators that torch's dispatcher sees, so a rehearsal counts what
they move. Letters: C tokens and B vocabulary rows of one block, S blocks, H hidden size.
"""

from __future__ import annotations

import torch

from rl_kernels.linear_logprob.chunked import block, block_columns
from rl_kernels.linear_logprob.products import NARROW, multiply

__all__ = ["block", "gradient_block", "statistics"]


def statistics(scaled_TH, weight_VH, local_T, *, temperature, with_entropy, chunk_tokens, rounded):
    """(maximum, exp_sum, exp_dot, label_logit), fp32 [S, T] each, S blocks of the vocabulary."""
    del rounded  # op.py refuses it
    tokens, rows = len(scaled_TH), len(weight_VH)
    chunk_tokens = max(1, min(chunk_tokens, tokens))
    width = block_columns(chunk_tokens, scaled_TH.device)
    out = torch.empty(4, -(-rows // width), tokens, dtype=torch.float32, device=scaled_TH.device)
    for split, first in enumerate(range(0, rows, width)):
        for start in range(0, tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_CB = multiply(scaled_TH[chunk], weight_VH[first:first + width].T)
            out[:, split, chunk] = logit_statistics(logits_CB, local_T[chunk] - first, 1.0 / temperature, with_entropy)
            del logits_CB  # before the next ones are made
    return out.unbind(0)


def gradient_block(scaled_CH, weight_BH, local_C, lse_C, entropy_C, g_logprob_C, g_entropy_C, *, temperature, rounded):
    """d loss / d (h . w) [C, B] as the parts that products takes. g_entropy_C None: the entropy carries no gradient."""
    del rounded
    logits_CB = multiply(scaled_CH, weight_BH.T)
    return logit_gradients(logits_CB, local_C, lse_C, entropy_C, g_logprob_C, g_entropy_C, 1.0 / temperature,
                           weight_BH.dtype)


@torch.library.custom_op("rl_kernels::logit_statistics", mutates_args=())
def logit_statistics(logits_CB: torch.Tensor, local_C: torch.Tensor, inverse_temperature: float,
                     with_entropy: bool) -> torch.Tensor:
    """(maximum, exp_sum, exp_dot, label_logit), fp32 [4, C], of float32 logits before the temperature."""
    return _kernels(logits_CB).block_statistics(logits_CB, local_C, inverse_temperature, with_entropy)


@logit_statistics.register_fake
def _(logits_CB, local_C, inverse_temperature, with_entropy):
    return logits_CB.new_empty(4, logits_CB.shape[0])


@torch.library.custom_op("rl_kernels::logit_gradients", mutates_args=())
def logit_gradients(logits_CB: torch.Tensor, local_C: torch.Tensor, lse_C: torch.Tensor, entropy_C: torch.Tensor | None,
                    g_logprob_C: torch.Tensor, g_entropy_C: torch.Tensor | None, inverse_temperature: float,
                    dtype: torch.dtype) -> list[torch.Tensor]:
    """What gradient_block returns: one float32 [C, B], or two of a 16-bit dtype."""
    found = _parts_like(logits_CB, dtype)
    _kernels(logits_CB).block_gradients(logits_CB, local_C, lse_C, entropy_C, g_logprob_C, g_entropy_C,
                                        inverse_temperature, found)
    return found


@logit_gradients.register_fake
def _(logits_CB, local_C, lse_C, entropy_C, g_logprob_C, g_entropy_C, inverse_temperature, dtype):
    return _parts_like(logits_CB, dtype)


def _parts_like(logits_CB, dtype):
    return [torch.empty_like(logits_CB, dtype=dtype) for _ in range(1 + (dtype in NARROW))]


def _kernels(tensor):
    """The module of the kernels, imported where they run: a rehearsal needs no Triton."""
    from rl_kernels.linear_logprob import triton_impl
    from rl_kernels.triton_impl import require_device

    require_device(tensor, "linear_logprob")
    return triton_impl
