"""Group-relative advantages from the rewards of whole groups, before any token is cut.

Letters: P prompts, K responses per prompt.
"""

from __future__ import annotations

from typing import Literal

import torch

from c3po.diagnostics import as_math_dtype

__all__ = ["group_advantages"]


def group_advantages(rewards_PK: torch.Tensor, *, judged_PK: torch.Tensor | None = None,
                     scale: Literal["std", "none"] = "std", eps: float = 1e-6) -> torch.Tensor:
    """A_i = (R_i - mean R) / (std R + eps) within each group of K responses (arXiv 2506.14731 Sec. 3.1).

    rewards_PK [P, K] -> float32 [P, K] (float64 in, float64 out); population standard deviation.
    judged_PK bool [P, K] marks the responses that have a reward; None means all. Responses without one do not enter the
    mean and the deviation and get exactly 0, for any value in their place.
    scale "none" only subtracts the mean (Dr. GRPO, arXiv 2503.20783). A group of equal rewards gets exactly 0, even if
    rounding makes their mean differ from them.
    ValueError: not two-dimensional, a judged reward that is not finite, unknown scale, or eps not positive.
    """
    if rewards_PK.dim() != 2:
        raise ValueError(f"rewards_PK must be [prompts, responses], not of shape {tuple(rewards_PK.shape)}")
    if scale not in ("std", "none"):
        raise ValueError(f"advantage scale={scale!r} must be 'std' or 'none'")
    if not eps > 0:
        raise ValueError(f"advantage eps={eps} must be positive")
    if judged_PK is not None and (judged_PK.dtype != torch.bool or judged_PK.shape != rewards_PK.shape):
        raise ValueError(f"judged_PK must be bool {tuple(rewards_PK.shape)}, not {judged_PK.dtype} "
                         f"{tuple(judged_PK.shape)}")
    rewards = as_math_dtype(rewards_PK)
    if judged_PK is not None and not bool(judged_PK.all()):
        advantages = torch.zeros_like(rewards)
        for group, judged in enumerate(judged_PK):  # groups of unequal size: each is a call of its own
            if bool(judged.any()):
                advantages[group, judged] = group_advantages(rewards[group, judged][None], scale=scale, eps=eps)[0]
        return advantages
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards_PK holds a reward that is not finite")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "std":
        centred = centred / (rewards.std(dim=1, keepdim=True, correction=0) + eps)
    all_equal_P1 = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(all_equal_P1, torch.zeros_like(centred), centred)
