"""The naive linear_logprob: all logits at once, autograd does the rest. What op.py is tested against.

Letters: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch

__all__ = ["linear_logprob_reference"]


def linear_logprob_reference(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    column_scale_H: torch.Tensor | None = None,
    rounded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of the label, entropy in nats), each [T], of softmax(h W^T / temperature).

    float32, or float64 for float64 inputs. rounded: the logits are rounded to the inputs' dtype first. Rows with a
    negative label give 0 and 0.
    """
    dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    hidden = hidden_TH.to(dtype)
    if column_scale_H is not None:
        hidden = hidden * column_scale_H.detach().to(dtype)
    logits_TV = hidden @ weight_VH.to(dtype).T
    if rounded:
        logits_TV = logits_TV.to(weight_VH.dtype).to(dtype)
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    label_T = logprobs_TV.gather(1, labels_T.clamp(min=0)[:, None]).squeeze(1)
    valid_T = labels_T >= 0
    return torch.where(valid_T, label_T, 0.0), torch.where(valid_T, entropy_T, 0.0)
