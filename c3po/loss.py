"""The loss of a slice of a step: surrogate, KL and entropy per token, summed over a denominator.

policy_loss takes any surrogate (surrogate.py) with any denominator (normalisation.py). c3po_loss and grpo_loss are the
two that Ring-lite names. All per-token tensors of a call have one shape: packed [T] or padded [B, L]. Arithmetic is
float32 (float64 in, float64 out). A masked value never reaches a nonlinearity, so inf or NaN there gives neither a loss
nor a gradient. The log ratio is not clamped: an overflow at a selected token stays visible.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from c3po.diagnostics import SumCount, as_math_dtype, k3, masked_sum_count
from c3po.normalisation import divided_sum
from c3po.surrogate import Surrogate, SurrogateFunction, SurrogateTerms, cispo_terms, clipped_terms, sequence_log_ratio

__all__ = ["C3POLossConfig", "c3po_loss", "grpo_loss", "policy_loss"]


@dataclass(frozen=True)
class C3POLossConfig:
    """Surrogate and coefficients of the objective; defaults are the paper's (arXiv 2506.14731 Sec. 4.3.3).

    - surrogate: the policy term that a token adds (surrogate.py).
    - clip_eps_low, clip_eps_high: the ratio is clipped to [1 - clip_eps_low, 1 + clip_eps_high]; clip_eps_low=1 is no
      lower bound.
    - kl_coef, kl_estimator: coefficient and estimator of the KL to the reference.
    - entropy_coef: coefficient of the entropy bonus.
    """

    surrogate: Surrogate = "ppo"
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    kl_coef: float = 1e-3
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 5e-4

    def __post_init__(self):
        if self.surrogate not in ("ppo", "gspo", "lpo", "cispo"):
            raise ValueError(f"surrogate={self.surrogate!r} must be ppo, gspo, lpo or cispo")
        if not 0 <= self.clip_eps_low <= 1:
            raise ValueError(f"clip_eps_low={self.clip_eps_low} must lie in [0, 1]")
        if not 0 <= self.clip_eps_high < float("inf"):
            raise ValueError(f"clip_eps_high={self.clip_eps_high} must be finite and not negative")
        if not 0 <= self.kl_coef < float("inf"):
            raise ValueError(f"kl_coef={self.kl_coef} must be finite and not negative")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator={self.kl_estimator!r} must be k1, k2 or k3")
        if not 0 <= self.entropy_coef < float("inf"):
            raise ValueError(f"entropy_coef={self.entropy_coef} must be finite and not negative")


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    denominator: float | torch.Tensor,
    config: C3POLossConfig,
    sequence_ids: torch.Tensor | None = None,
    sentence_ids: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    surrogate: SurrogateFunction | None = None,
) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """-sum over selected tokens of [w surrogate - kl_coef KL + entropy_coef H] / denominator.

    - logprobs: new, with gradient. entropy: exact softmax entropy in nats, with gradient.
    - weights: mismatch weights w of correction.py. They are detached and multiply the policy-gradient term only, never
      KL or entropy.
    - loss_mask: bool, marks the selected tokens.
    - denominator: of the whole step (StepTotals), so slices of a step add up to the step; one number, or one per token.
    - sequence_ids (sequences.py): needed by surrogate="gspo", whose slices must hold whole sequences. sentence_ids: the
      same for sentences, needed by surrogate="lpo". A sentence must not reach over two sequences.
    - surrogate: a function of your own instead of config.surrogate (surrogate.py says what it takes).

    Returns the 0-dim loss and the sums that README.md lists.
    ValueError: a denominator that is not positive, a shape that differs, a mask that is not bool, or a surrogate or
    coefficient above 0 whose input (sequence_ids, sentence_ids, ref_logprobs, entropy) is missing.
    """
    objective, sums = _token_objective(logprobs, old_logprobs, advantages, loss_mask, config, sequence_ids,
                                       sentence_ids, ref_logprobs, entropy, weights, surrogate)
    return -divided_sum(objective, loss_mask, denominator), sums


def c3po_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    phi: int,
    config: C3POLossConfig,
    sequence_ids: torch.Tensor | None = None,
    sentence_ids: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """The C3PO loss of a slice of a step: policy_loss over the constant phi (Eq. 2, 6).

    -(1/phi) sum [w min(r A, clip(r, 1-eps_low, 1+eps_high) A) - kl_coef KL + entropy_coef H], r = new/old.

    phi: budget of the whole step, in response tokens. ValueError: as in policy_loss, and phi < 1.
    """
    if not phi >= 1:
        raise ValueError(f"phi={phi} must be at least 1 token")
    return policy_loss(logprobs, old_logprobs, advantages, loss_mask, denominator=phi, config=config,
                       sequence_ids=sequence_ids, sentence_ids=sentence_ids, ref_logprobs=ref_logprobs, entropy=entropy,
                       weights=weights)


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    response_lengths: torch.Tensor,
    num_responses: int,
    config: C3POLossConfig,
    sequence_ids: torch.Tensor | None = None,
    sentence_ids: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """The GRPO loss of a slice of a step: mean over responses of the mean over their tokens (Eq. 1).

    It is policy_loss with the divisor |y_i| * num_responses at each token of response i. response_lengths: |y_i| > 0 of
    the token's own response, at each token. num_responses: of the whole step. The sums are over tokens, unweighted, as
    in c3po_loss. ValueError: as in policy_loss, and num_responses < 1.
    """
    if not num_responses >= 1:
        raise ValueError(f"num_responses={num_responses} must be at least 1")
    _check_shape("response_lengths", response_lengths, logprobs)
    return policy_loss(logprobs, old_logprobs, advantages, loss_mask, denominator=response_lengths * num_responses,
                       config=config, sequence_ids=sequence_ids, sentence_ids=sentence_ids, ref_logprobs=ref_logprobs,
                       entropy=entropy, weights=weights)


def _token_objective(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    config: C3POLossConfig,
    sequence_ids: torch.Tensor | None,
    sentence_ids: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    entropy: torch.Tensor | None,
    weights: torch.Tensor | None,
    surrogate: SurrogateFunction | None,
) -> tuple[torch.Tensor, dict[str, SumCount]]:
    """What each token adds to the objective (to be maximised), 0 outside the mask, and the detached sums."""
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be bool, not {loss_mask.dtype}")
    if surrogate is None and config.surrogate == "gspo" and sequence_ids is None:
        raise ValueError("surrogate=gspo needs sequence_ids; pass packed_sequence_ids or padded_sequence_ids")
    if surrogate is None and config.surrogate == "lpo" and sentence_ids is None:
        raise ValueError("surrogate=lpo needs sentence_ids: the number of its sentence at each token")
    if config.kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef={config.kl_coef} needs ref_logprobs; pass them or set kl_coef=0")
    if config.entropy_coef > 0 and entropy is None:
        raise ValueError(f"entropy_coef={config.entropy_coef} needs entropy; pass it or set entropy_coef=0")
    named = {"old_logprobs": old_logprobs, "advantages": advantages, "loss_mask": loss_mask,
             "ref_logprobs": ref_logprobs, "entropy": entropy, "weights": weights}
    for name, tensor in named.items():
        if tensor is not None:
            _check_shape(name, tensor, logprobs)

    new = _masked(as_math_dtype(logprobs), loss_mask)
    log_ratio = _masked(new - as_math_dtype(old_logprobs).detach(), loss_mask)
    advantage = _masked(as_math_dtype(advantages).detach(), loss_mask)
    units = {"gspo": sequence_ids, "lpo": sentence_ids}.get(config.surrogate)
    terms = _surrogate(config, new, log_ratio, advantage, loss_mask, units, surrogate)
    policy = terms.objective
    if weights is not None:
        policy = policy * _masked(as_math_dtype(weights).detach(), loss_mask)

    objective = policy
    not_measured = SumCount(policy.new_zeros((), dtype=torch.float64), policy.new_zeros((), dtype=torch.float64))
    kl_sum, entropy_sum = not_measured, not_measured
    if ref_logprobs is not None:
        kl = _kl(_masked(as_math_dtype(ref_logprobs).detach() - new, loss_mask), config.kl_estimator)
        kl_sum = masked_sum_count(kl, loss_mask)
        objective = objective - config.kl_coef * kl if config.kl_coef > 0 else objective
    if entropy is not None:
        token_entropy = _masked(as_math_dtype(entropy), loss_mask)
        entropy_sum = masked_sum_count(token_entropy, loss_mask)
        objective = objective + config.entropy_coef * token_entropy if config.entropy_coef > 0 else objective

    selected_tokens = loss_mask.sum().double()
    return objective, {
        "policy_loss": masked_sum_count(-policy, loss_mask),
        "kl": kl_sum,
        "entropy": entropy_sum,
        "ratio": masked_sum_count(terms.ratio, loss_mask),
        "clip_low_fraction": masked_sum_count(terms.clipped_low.double(), loss_mask),
        "clip_high_fraction": masked_sum_count(terms.clipped_high.double(), loss_mask),
        "approx_kl": masked_sum_count(k3(log_ratio.detach()), loss_mask),
        "selected_tokens": SumCount(selected_tokens, torch.ones_like(selected_tokens)),
    }


def _surrogate(config: C3POLossConfig, new: torch.Tensor, log_ratio: torch.Tensor, advantage: torch.Tensor,
               loss_mask: torch.Tensor, units: torch.Tensor | None,
               own: SurrogateFunction | None) -> SurrogateTerms:
    bounds = {"eps_low": config.clip_eps_low, "eps_high": config.clip_eps_high}
    if own is not None:
        terms = own(new, log_ratio, advantage, loss_mask, **bounds)
        for name in ("objective", "ratio", "clipped_low", "clipped_high"):
            _check_shape(f"the surrogate's {name}", getattr(terms, name), new)
        return replace(terms, objective=_masked(terms.objective, loss_mask))
    if config.surrogate == "cispo":
        return cispo_terms(new, log_ratio, advantage, **bounds)
    if units is not None:  # the response or the sentence that has one ratio
        log_ratio = sequence_log_ratio(log_ratio, loss_mask, units)
    return clipped_terms(log_ratio, advantage, **bounds)


def _kl(ref_minus_new: torch.Tensor, estimator: str) -> torch.Tensor:
    """KL(new || ref) per sampled token, with gradient (joschu.net/blog/kl-approx.html), from log(ref/new).

    As a loss, k1 has an expected gradient of zero over on-policy samples; k2 and k3 pull towards ref.
    """
    if estimator == "k1":
        return -ref_minus_new
    if estimator == "k2":
        return ref_minus_new.square() / 2
    return k3(ref_minus_new)


def _masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, torch.zeros_like(values))


def _check_shape(name: str, tensor: torch.Tensor, logprobs: torch.Tensor) -> None:
    if tensor.shape != logprobs.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, logprobs has {tuple(logprobs.shape)}")
