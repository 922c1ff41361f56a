"""What one token adds to the policy objective (to be maximised), by PPO's clip, GSPO, LPO or CISPO.

r = new / old at the token, s = the geometric mean of r over the selected tokens of its response, u = the same over
those of its sentence, sg = stop-gradient, clip(x) to [1 - eps_low, 1 + eps_high]:

| surrogate | term | its gradient |
| --- | --- | --- |
| ppo | min(r A, clip(r) A) | r A grad log new, 0 where the clip cuts |
| gspo | the same with s = sg(s) new / sg(new) for r | s A grad log new, 0 for a whole response that the clip cuts |
| lpo | the same with u = sg(u) new / sg(new) for r | u A grad log new, 0 for a whole sentence that the clip cuts |
| cispo | sg(clip(r)) A log new | clip(r) A grad log new, at every token |

GSPO is arXiv 2507.18071 in its token form (GSPO-token). If a response has one advantage, its value and gradient equal
those of the sequence form. LPO (Linguistics-Unit Policy Optimization) is Ling 2.0, arXiv 2510.22115: a sentence k of
n_k tokens adds n_k min(u A, clip(u) A), which in the token form is the sum of its tokens' terms. One sentence for the
whole response makes it GSPO, one token for each sentence makes it PPO. Our text of the formula is second-hand: we did
not have the report itself at hand. CISPO is MiniMax-M1, arXiv 2506.13585.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from c3po.sequences import sequence_mean

__all__ = ["Surrogate", "SurrogateFunction", "SurrogateTerms", "cispo_terms", "clipped_terms", "sequence_log_ratio"]

Surrogate = Literal["ppo", "gspo", "lpo", "cispo"]


@dataclass(frozen=True)
class SurrogateTerms:
    """Per token: the objective with gradient, the ratio it used, and where the clip acted (bool), below and above."""

    objective: torch.Tensor
    ratio: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


SurrogateFunction = Callable[..., SurrogateTerms]
"""(logprobs, log_ratio, advantages, loss_mask, *, eps_low, eps_high) -> SurrogateTerms, all tensors of one shape.

logprobs and log_ratio carry the gradient. Outside loss_mask all three are 0, and what is returned there is ignored.
"""


def clipped_terms(log_ratio: torch.Tensor, advantages: torch.Tensor, *, eps_low: float,
                  eps_high: float) -> SurrogateTerms:
    """min(r A, clip(r) A) for r = exp(log_ratio). Unequal bounds are DAPO's clip-higher (arXiv 2503.14476 Eq. 10)."""
    ratio = log_ratio.exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    return SurrogateTerms(objective, ratio, clipped_low=(advantages < 0) & (ratio < 1 - eps_low),
                          clipped_high=(advantages > 0) & (ratio > 1 + eps_high))


def sequence_log_ratio(log_ratio: torch.Tensor, loss_mask: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    """log s at each selected token, 0 elsewhere: its value is the sequence's, its gradient the token's own.

    With the ids of sentences it is log u. If the budget cut the response, the mean is over the kept tokens.
    """
    value = sequence_mean(log_ratio.detach(), loss_mask, sequence_ids)
    return torch.where(loss_mask, value + (log_ratio - log_ratio.detach()), torch.zeros_like(log_ratio))


def cispo_terms(logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, *, eps_low: float,
                eps_high: float) -> SurrogateTerms:
    """sg(clip(r)) A log new: the weight is clipped, the gradient of no token is dropped."""
    ratio = log_ratio.detach().exp()
    objective = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages * logprobs
    return SurrogateTerms(objective, ratio, clipped_low=ratio < 1 - eps_low, clipped_high=ratio > 1 + eps_high)
