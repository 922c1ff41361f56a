"""C3PO in verl: an advantage estimator that applies the token budget and a policy loss that divides by Phi.

Written for verl 0.9.1; importing this module registers both under the name "c3po". Shapes: N responses of the
step's whole batch or B of a micro-batch, L padded response positions.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

from c3po import C3POLossConfig, c3po_loss, group_advantages, select_within_budget, selection_order

_steps = itertools.count()  # the driver calls the estimator once a step


@register_adv_est("c3po")
def budgeted_advantages(token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: np.ndarray,
                        config=None, **_) -> tuple[torch.Tensor, torch.Tensor]:
    """Group-relative advantages [N, L], exactly 0 past the budget algorithm.c3po_phi (arXiv 2506.14731 Eq. 3).

    token_level_rewards, response_mask [N, L]; index [N], the prompt of each response. A token of advantage 0 adds
    nothing to the policy loss, so zeros are the cut; verl hands no other per-token field back to the actor.
    """
    rewards = token_level_rewards.sum(-1)
    advantages = torch.empty_like(rewards)
    for prompt in np.unique(index):
        group = torch.from_numpy(index == prompt).to(rewards.device)
        advantages[group] = group_advantages(rewards[group][None])[0]
    mask = response_mask.bool()
    order = selection_order(len(rewards), seed=0, step=next(_steps)).to(rewards.device)
    kept = select_within_budget(mask.sum(-1), order, phi=config["c3po_phi"]).kept_tokens_N
    within = mask & (mask.cumsum(-1) <= kept[:, None])
    result = torch.where(within, advantages[:, None], 0.0)
    return result, result


@register_policy_loss("c3po")
def c3po_policy_loss(old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor,
                     response_mask: torch.Tensor, loss_agg_mode: str = "token-sum", config=None,
                     rollout_is_weights: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, float]]:
    """The policy term of Eq. 2 of a micro-batch, over the constant Phi = actor.loss_scale_factor.

    All tensors [B, L]. verl averages gradients over dp_size ranks and adds micro-batches up; KL and entropy are
    verl's own terms, with the same divisor under loss_agg_mode=token-sum and coefficients divided by Phi.
    """
    phi = config.loss_scale_factor
    if phi is None:
        raise ValueError("actor.loss_scale_factor is not set: C3PO reads Phi from it")
    if loss_agg_mode != "token-sum":
        raise ValueError(f"actor.loss_agg_mode={loss_agg_mode} must be token-sum: any other divides KL and entropy "
                         "by numbers that vary with the lengths")
    loss_config = C3POLossConfig(clip_eps_low=config.clip_ratio_low, clip_eps_high=config.clip_ratio_high,
                                 kl_coef=0.0, entropy_coef=0.0)
    loss, sums = c3po_loss(log_prob, old_log_prob, advantages, response_mask.bool(), phi=phi, config=loss_config,
                           weights=rollout_is_weights)
    tokens = max(1.0, sums["selected_tokens"].sum.item())
    metrics = {"actor/pg_clipfrac": sums["clip_high_fraction"].sum.item() / tokens,
               "actor/pg_clipfrac_lower": sums["clip_low_fraction"].sum.item() / tokens,
               "actor/ppo_kl": sums["approx_kl"].sum.item() / tokens}
    return loss * config.global_batch_info.get("dp_size", 1), metrics
