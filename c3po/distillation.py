"""On-policy distillation: a teacher judges each token that the student sampled, beside the task's reward or instead.

The student and the teacher meet at the sampled token alone, so the gap ln student - ln teacher is the one-sample
estimate of the reverse KL(student || teacher) at that token. Taken off the advantage, it is followed by the policy
gradient: Ling & Ring 2.6 (arXiv 2606.15079, at second hand), and before it Agarwal et al. (arXiv 2306.13649) for the
idea of training on the student's own samples.
"""

from __future__ import annotations

import torch

from c3po.diagnostics import SumCount, as_math_dtype, k3, masked_sum_count

__all__ = ["distilled_advantages"]


@torch.no_grad()
def distilled_advantages(advantages: torch.Tensor, old_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor,
                         loss_mask: torch.Tensor, *, coef: float,
                         task_reward: bool = True) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """A - coef (ln old - ln teacher) at each token, without gradient; A counts as 0 if task_reward is False.

    All tensors share one shape. old_logprobs: of the student, by the trainer, before the update. teacher_logprobs: of
    the same tokens; NaN marks a token without a teacher, which keeps A. The result goes into policy_loss, whose divisor
    (Phi) then divides this term too. Outside loss_mask it is 0.
    Returns (advantages, sums): distill_gap, whose mean estimates KL(old || teacher) in nats; distill_kl, its k3
    estimate, never negative. Both are over tokens that have a teacher.
    ValueError: coef is negative or not finite, shapes differ, mask not bool.
    """
    if not 0 <= coef < float("inf"):
        raise ValueError(f"distillation coef={coef} must be finite and not negative")
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be bool, not {loss_mask.dtype}")
    if not advantages.shape == old_logprobs.shape == teacher_logprobs.shape == loss_mask.shape:
        raise ValueError(f"advantages {tuple(advantages.shape)}, old_logprobs {tuple(old_logprobs.shape)}, "
                         f"teacher_logprobs {tuple(teacher_logprobs.shape)} and loss_mask {tuple(loss_mask.shape)} "
                         "must have one shape")
    taught = loss_mask & ~teacher_logprobs.isnan()
    gap = as_math_dtype(old_logprobs) - as_math_dtype(teacher_logprobs)
    gap = torch.where(taught, gap, torch.zeros_like(gap))
    own = torch.where(loss_mask, as_math_dtype(advantages), 0.0) if task_reward else torch.zeros_like(gap)
    return own - coef * gap, {"distill_gap": masked_sum_count(gap, taught),
                              "distill_kl": masked_sum_count(k3(-gap), taught)}
