"""The naive grouped_experts: one expert after the other, autograd does the rest. What op.py is tested against.

Letters: T tokens, K choices of a token, E experts, H hidden size, F width of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["grouped_experts_reference"]


def grouped_experts_reference(hidden_TH, gate_up_E2FH, down_EHF, indices_TK, weights_TK) -> torch.Tensor:
    """[T, H]: sum over k of weights[t, k] * down_e (silu(gate_e h_t) * up_e h_t), e = indices[t, k], skipped if e < 0.

    float32, or float64 for float64 inputs.
    """
    dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    hidden_TH, weights_TK = hidden_TH.to(dtype), weights_TK.to(dtype)
    out_TH = torch.zeros_like(hidden_TH)
    for expert in range(len(gate_up_E2FH)):
        tokens, choice = (indices_TK == expert).nonzero(as_tuple=True)
        gate, up = (hidden_TH[tokens] @ gate_up_E2FH[expert].to(dtype).T).chunk(2, -1)
        activated = F.silu(gate) * up * weights_TK[tokens, choice][:, None]
        out_TH = out_TH.index_add(0, tokens, activated @ down_EHF[expert].to(dtype).T)
    return out_TH
