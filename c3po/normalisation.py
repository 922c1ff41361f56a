"""The divisor of the sum over a step's tokens; the four members of the family differ only in it here.

| normalisation | each token weighs | source |
| --- | --- | --- |
| c3po | 1 / Phi | Ring-lite, arXiv 2506.14731 Eq. 2 |
| grpo | 1 / (abs(y_i) N): every response weighs the same | arXiv 2506.14731 Eq. 1 |
| dr_grpo | 1 / (N L_max), constant: neither length nor std | Dr. GRPO, arXiv 2503.20783, with advantage scale "none" |
| token_mean | 1 / tokens of the step | DAPO, arXiv 2503.14476 Eq. 8; CISPO, arXiv 2506.13585 |

N responses; L_max the longest response that may be generated. Each works with any surrogate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["Normalisation", "StepTotals", "divided_sum"]

Normalisation = Literal["c3po", "grpo", "dr_grpo", "token_mean"]


@dataclass(frozen=True)
class StepTotals:
    """What a step's loss may be divided by. Each total is of the whole step over all ranks, so slices add up.

    phi: the token budget. selected_tokens: response tokens that carry loss. num_responses: responses that the step drew
    from. max_response_tokens: the generation limit, not the longest response that came.
    """

    phi: int
    selected_tokens: int
    num_responses: int
    max_response_tokens: int

    def denominator(self, normalisation: Normalisation, response_lengths: torch.Tensor) -> int | torch.Tensor:
        """The divisor of each token's term: one number for the step, or for grpo a tensor like response_lengths.

        response_lengths: |y_i| of the token's own response, at each token. A step without tokens or responses sums to
        0, and its divisor is 1. ValueError: unknown normalisation.
        """
        if normalisation == "c3po":
            return self.phi
        if normalisation == "grpo":
            return response_lengths * max(1, self.num_responses)
        if normalisation == "dr_grpo":
            return max(1, self.num_responses) * self.max_response_tokens
        if normalisation == "token_mean":
            return max(1, self.selected_tokens)
        raise ValueError(f"normalisation={normalisation!r} must be c3po, grpo, dr_grpo or token_mean")


def divided_sum(values: torch.Tensor, mask: torch.Tensor, denominator: float | torch.Tensor) -> torch.Tensor:
    """The sum of values / denominator, 0-dim; values are 0 outside mask, and a divisor there has no say.

    denominator: one number, or a tensor like values. ValueError: a number that is not positive, or another shape.
    """
    if not isinstance(denominator, torch.Tensor):
        if not denominator > 0:
            raise ValueError(f"denominator={denominator} must be positive")
        return values.sum() / denominator
    if denominator.shape != values.shape:
        raise ValueError(f"denominator has shape {tuple(denominator.shape)}, logprobs has {tuple(values.shape)}")
    return (values / torch.where(mask, denominator.to(values.dtype), torch.ones_like(values))).sum()
