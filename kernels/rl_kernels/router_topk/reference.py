"""The naive router_topk in plain torch; autograd does the rest. Also what runs on a CPU.

Letters: T tokens, E experts, K choices, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routed(NamedTuple):
    """Choices of every token, and sums over the real tokens. Gradients flow from weights, prob_sums and z_sum."""

    weights_TK: torch.Tensor
    indices_TK: torch.Tensor
    counts_E: torch.Tensor
    prob_sums_E: torch.Tensor
    z_sum: torch.Tensor
    entropy_sum: torch.Tensor


def router_topk_reference(hidden_TH, weight_EH, k, *, normalize=True, indices_TK=None, real_T=None) -> Routed:
    """As op.router_topk; float32, or float64 for float64 inputs."""
    dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    logits_TE = hidden_TH.to(dtype) @ weight_EH.to(dtype).T
    if indices_TK is None:
        indices_TK = logits_TE.topk(k, -1).indices
    probs_TE = logits_TE.softmax(-1)
    weights_TK = (logits_TE.gather(1, indices_TK).softmax(-1) if normalize else probs_TE.gather(1, indices_TK))
    real_T1 = (torch.ones_like(logits_TE[:, :1]) if real_T is None else real_T[:, None].to(dtype))
    chosen_TE = torch.zeros_like(probs_TE).scatter(1, indices_TK, 1.0)
    lse_T1 = logits_TE.logsumexp(-1, keepdim=True)
    entropy_T1 = lse_T1 - (probs_TE * logits_TE).sum(-1, keepdim=True)
    return Routed(weights_TK, indices_TK, (chosen_TE * real_T1).sum(0), (probs_TE * real_T1).sum(0),
                  (lse_T1.square() * real_T1).sum(), (entropy_T1 * real_T1).sum().detach())
