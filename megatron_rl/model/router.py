"""The router with balance and z-losses that do not depend on packing or layout.

Megatron's own auxiliary losses are means per micro-batch, so their gradient changes with the packing.
Here both are sums over the tokens of the whole optimiser step divided by one constant (Eq. 5):

    z       = z_coef       * sum_t logsumexp(logits_t)^2 / step_tokens
    balance = balance_coef * E * sum_e F_e * sum_t p_{t,e} / step_tokens

p are the router's probabilities: softmax of the logits, or their sigmoids divided by the sum over all experts.
step_tokens counts every real token the router sees in the step on all ranks (prompt and response, padding
excluded). F_e, the fraction of the step's top-k choices that went to expert e, has no gradient. It comes from the
counting pass that precedes the update (in RL the old-log-probability pass). If one micro-batch on each rank is the
whole step, no such pass is needed: F_e comes from that micro-batch, over all ranks. Both losses enter as Megatron's
MoEAuxLossAutoScaler attaches them, whose scale (schedules.forward_step_calc_loss: cp_size / num_microbatches) and
DDP's division by dp*cp are undone by `RouterLosses.scale`.

Under routing replay (routing_replay.py) F counts the replayed choices, which is the load that the experts carry, and
p is the live router's: the loss moves probability away from the experts that were busy when the tokens were sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_rl.model.routing_replay import LayerReplay


@dataclass
class RoutingCounts:
    """Layer number (from 1) -> tokens per expert fp32 [E], and the sum of the router's entropies fp32 [] in nats."""

    experts: dict[int, torch.Tensor] = field(default_factory=dict)
    entropies: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class RouterLosses:
    """What every router of one model shares during a step; set by train_step, read in forward.

    load_fractions: layer number (from 1) -> fp32 [E], summing to 1; empty: this micro-batch's own.
    counts: of the forward passes that `counting` names: those with a gradient (True; once each, also under
    recompute), those without (False), or none.
    """

    balance_coef: float = 0.0
    z_coef: float = 0.0
    step_tokens: float = 1.0
    scale: float = 1.0
    counting: bool | None = None
    load_fractions: dict[int, torch.Tensor] = field(default_factory=dict)
    counts: RoutingCounts = field(default_factory=RoutingCounts)
    loss_sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def begin_counting(self, *, with_gradient: bool) -> None:
        self.counting = with_gradient
        self.counts = RoutingCounts()

    def begin_update(self, *, step_tokens: float, scale: float, load_fractions: dict[int, torch.Tensor]) -> None:
        self.step_tokens, self.scale, self.load_fractions = step_tokens, scale, load_fractions
        self.loss_sums = {}

    def add(self, store: dict, key, value: torch.Tensor) -> None:
        store[key] = store[key] + value if key in store else value


class RouterSums(Protocol):
    """Over the real tokens of a micro-batch on this rank, fp32: choices of each expert and sums of its probability
    [E], sum of logsumexp(logits)^2, sum of the entropy of the probabilities (no gradient). rl_kernels.Routed is one."""

    counts_E: torch.Tensor
    prob_sums_E: torch.Tensor
    z_sum: torch.Tensor
    entropy_sum: torch.Tensor


@dataclass(frozen=True)
class EagerSums:
    """RouterSums computed when they are read. logits fp32 [T, E], routing_map bool [T, E], real fp32 [T, 1].

    score_function: softmax or sigmoid.
    """

    logits_TE: torch.Tensor
    routing_map_TE: torch.Tensor
    real_T1: torch.Tensor
    score_function: str

    @property
    def counts_E(self) -> torch.Tensor:
        return (self.routing_map_TE.float() * self.real_T1).sum(0)

    @property
    def prob_sums_E(self) -> torch.Tensor:
        return (self._probs_TE() * self.real_T1).sum(0)

    @property
    def z_sum(self) -> torch.Tensor:
        return (self.logits_TE.logsumexp(-1).square() * self.real_T1[:, 0]).sum()

    @property
    @torch.no_grad()
    def entropy_sum(self) -> torch.Tensor:
        return (torch.special.entr(self._probs_TE()).sum(-1) * self.real_T1[:, 0]).sum()

    def _probs_TE(self) -> torch.Tensor:
        if self.score_function == "softmax":
            return self.logits_TE.softmax(-1)
        scores = self.logits_TE.sigmoid()
        return scores / scores.sum(-1, keepdim=True)


class BudgetRouter(TopKRouter):
    """Megatron's TopKRouter with the two losses above; which experts it takes may be replayed."""

    def __init__(self, *args, losses: RouterLosses, experts_ranking_a_group: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = losses
        self.router_replay = LayerReplay(experts_ranking_a_group)
        self.frozen_expert_bias = True  # to Megatron's finalize_model_grads; `move_expert_bias` moves it

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        self.router_replay.moe_layer = sum(self.config.moe_layer_freq[:layer_number - 1])

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """(probs, routing_map), both [tokens, E], as TopKRouter.routing; padding_mask True = padding."""
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        logits_TE = logits.view(-1, self.config.num_moe_experts).float()
        sums = EagerSums(logits_TE, routing_map, self._real(padding_mask, logits_TE), self.score_function)
        return self._account(probs, sums), routing_map

    @torch.no_grad()
    def move_expert_bias(self, counts_E: torch.Tensor, rate: float) -> None:
        """The bias of experts above the mean load falls by `rate`, that of those below rises (arXiv 2408.15664).

        The formula is Megatron's (moe_utils.get_updated_expert_bias). counts_E: choices of the whole step by expert.
        """
        self.expert_bias += rate * torch.sign(counts_E.mean() - counts_E)

    def _apply_expert_bias(self, routing_map, padding_mask=None) -> None:
        """Megatron would count here; RoutingCounts has the counts of the step."""

    def _account(self, probs: torch.Tensor, sums: RouterSums) -> torch.Tensor:
        """probs, with the losses of this micro-batch attached; counts what is to be counted."""
        losses = self.losses
        if losses.counting is torch.is_grad_enabled():
            losses.add(losses.counts.experts, self.layer_number, sums.counts_E)
            losses.add(losses.counts.entropies, self.layer_number, sums.entropy_sum)
        if self.training and torch.is_grad_enabled() and (losses.balance_coef or losses.z_coef):
            probs = MoEAuxLossAutoScaler.apply(probs, self._losses(sums))
        return probs

    @staticmethod
    def _real(padding_mask: torch.Tensor | None, logits_TE: torch.Tensor) -> torch.Tensor:
        if padding_mask is None:
            return torch.ones(logits_TE.shape[0], 1, dtype=torch.float32, device=logits_TE.device)
        return (~padding_mask.reshape(-1, 1)).float()

    def _losses(self, sums: RouterSums) -> torch.Tensor:
        losses = self.losses
        z = sums.z_sum / losses.step_tokens
        balance = self.config.num_moe_experts * (self._load_fractions(sums) * sums.prob_sums_E).sum() \
            / losses.step_tokens
        losses.add(losses.loss_sums, "z_loss", z.detach())
        losses.add(losses.loss_sums, "balance_loss", balance.detach())
        return losses.scale * (losses.z_coef * z + losses.balance_coef * balance)

    @torch.no_grad()
    def _load_fractions(self, sums: RouterSums) -> torch.Tensor:
        if self.layer_number in self.losses.load_fractions:
            return self.losses.load_fractions[self.layer_number]
        counts_E = sums.counts_E.clone()
        torch.distributed.all_reduce(counts_E, group=self.tp_dp_cp_group)
        return counts_E / counts_E.sum().clamp(min=1)
