"""How the loss treats a response that the generation length limit cut (finish reason `length`).

The cut by the token budget is another thing, in budget.py. Letter: N responses.
"""

from __future__ import annotations

from typing import Literal

import torch

from c3po.diagnostics import as_math_dtype

__all__ = ["TruncationPolicy", "soft_overlong_penalty", "truncation_keep_mask"]

TruncationPolicy = Literal["train", "mask", "overlong_penalty"]


def truncation_keep_mask(is_truncated_N: torch.Tensor, policy: TruncationPolicy) -> torch.Tensor:
    """Which responses keep their loss, bool [N], given which the length limit cut, bool [N].

    train: all, as they are. mask: only finished ones; a masked response still counts in its group's advantages.
    overlong_penalty: all; soft_overlong_penalty lowers their reward instead.
    ValueError: unknown policy, or is_truncated_N not bool.
    """
    if is_truncated_N.dtype != torch.bool:
        raise ValueError(f"is_truncated_N must be bool, not {is_truncated_N.dtype}")
    if policy not in ("train", "mask", "overlong_penalty"):
        raise ValueError(f"truncation policy={policy!r} must be 'train', 'mask' or 'overlong_penalty'")
    return ~is_truncated_N if policy == "mask" else torch.ones_like(is_truncated_N)


def soft_overlong_penalty(lengths_N: torch.Tensor, *, max_response_tokens: int, buffer_tokens: int) -> torch.Tensor:
    """The reward to add for length (DAPO, arXiv 2503.14476 Eq. 13): 0, then falling linearly to -1.

    lengths_N in tokens -> float32 [N]: 0 up to max_response_tokens - buffer_tokens, -1 from
    max_response_tokens on, linear in between.
    ValueError: unless 1 <= buffer_tokens <= max_response_tokens.
    """
    if not 1 <= buffer_tokens <= max_response_tokens:
        raise ValueError(f"buffer_tokens={buffer_tokens} must lie in [1, max_response_tokens={max_response_tokens}]")
    over = as_math_dtype(lengths_N) - (max_response_tokens - buffer_tokens)
    return -(over / buffer_tokens).clamp(0.0, 1.0)
