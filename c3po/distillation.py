"""On-policy distillation: a teacher judges each token that the student sampled, beside the task's reward or instead.

distilled_advantages: the student and the teacher meet at the sampled token alone, so the gap ln student - ln teacher is
the one-sample estimate of the reverse KL(student || teacher) at that token. Taken off the advantage, it is followed by
the policy gradient: Ling & Ring 2.6 (arXiv 2606.15079, at second hand).

topk_distillation_loss: the two meet at k tokens of the vocabulary, and all other tokens count as one more. The KL of
these k + 1 events has a gradient of its own, without sampling noise. Both directions of the KL on the student's own
samples: Agarwal et al. (arXiv 2306.13649 Sec. 3).
"""

from __future__ import annotations

from typing import Literal

import torch

from c3po.diagnostics import SumCount, as_math_dtype, k3, masked_sum_count
from c3po.normalisation import divided_sum

__all__ = ["Divergence", "distilled_advantages", "topk_distillation_loss"]

Divergence = Literal["reverse", "forward"]
LEAST_REST = 1e-6
"""The tokens outside the k have at least this probability together. Below it float32 cannot tell it from 0."""


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


def topk_distillation_loss(
    logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    coef: float,
    denominator: float | torch.Tensor,
    divergence: Divergence = "reverse",
) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """coef * sum over taught tokens of KL / denominator: the dense term of a slice of a step, to be minimised.

    - logprobs [..., k], with gradient, and teacher_logprobs [..., k], without: of the same k tokens of the vocabulary,
      at the position of each token of loss_mask [...]. A position whose first teacher_logprobs is NaN has no teacher.
    - divergence: `reverse` is KL(student || teacher), `forward` is KL(teacher || student). Both are over k + 1 events:
      the k tokens, and all others together. So the KL is never negative, it is 0 for two equal rows, and it is at most
      the KL over the whole vocabulary.
    - denominator: as in policy_loss, so Phi divides this term as it divides the others, and slices add up.

    Returns (loss, sums): distill_kl; distill_mass and distill_teacher_mass, the probability that student and teacher
    give the k tokens together. All are over tokens that have a teacher.
    ValueError: coef is negative or not finite, shapes differ, mask not bool, denominator not positive.
    """
    if not 0 <= coef < float("inf"):
        raise ValueError(f"distillation coef={coef} must be finite and not negative")
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be bool, not {loss_mask.dtype}")
    if divergence not in ("reverse", "forward"):
        raise ValueError(f"divergence={divergence!r} must be reverse or forward")
    if logprobs.shape != teacher_logprobs.shape or logprobs.shape[:-1] != loss_mask.shape or not logprobs.shape[-1]:
        raise ValueError(f"logprobs {tuple(logprobs.shape)} and teacher_logprobs {tuple(teacher_logprobs.shape)} must "
                         f"have one shape, that of loss_mask {tuple(loss_mask.shape)} and one more dimension")
    taught = loss_mask & ~teacher_logprobs[..., 0].isnan()
    own, theirs = (_events(torch.where(taught[..., None], as_math_dtype(each), -float(logprobs.shape[-1] + 1)))
                   for each in (logprobs, teacher_logprobs.detach()))
    first, second = (own, theirs) if divergence == "reverse" else (theirs, own)
    kl = torch.where(taught, (first.exp() * (first - second)).sum(-1), 0.0)
    mass, teacher_mass = (-torch.expm1(each.detach()[..., -1]) for each in (own, theirs))
    return coef * divided_sum(kl, taught, denominator), {
        "distill_kl": masked_sum_count(kl, taught), "distill_mass": masked_sum_count(mass, taught),
        "distill_teacher_mass": masked_sum_count(teacher_mass, taught)}


def _events(logprobs: torch.Tensor) -> torch.Tensor:
    """[..., k + 1]: the k log-probabilities, and that of all other tokens together."""
    inside = logprobs.logsumexp(-1, keepdim=True).clamp(max=-LEAST_REST)
    return torch.cat([logprobs, torch.log(-torch.expm1(inside))], dim=-1)
