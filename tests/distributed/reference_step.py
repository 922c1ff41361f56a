"""The same step in plain torch and float64, sequence by sequence: what every layout is compared against.

Nothing here knows packing, micro-batches, ranks or Megatron. Letters: L positions of a sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import tests.distributed.cases as cases
from tests.reference_bailing import bailing_forward, is_frozen, scores_by_sigmoid

Weights = dict[str, torch.Tensor]
Config = Mapping[str, Any]  # the parsed config.json


@dataclass
class Reference:
    """What the step gives: gradients and one AdamW step by name, and the numbers that it reports."""

    start: Weights
    gradients: Weights
    updated: Weights
    grad_norm: float
    report: dict[str, float]
    surrogates: dict[str, Weights]


class RouterLogits(TorchFunctionMode):
    """Collects what F.linear gives with a router's weight, [L, E] per MoE layer in order."""

    def __init__(self, weights: Weights):
        super().__init__()
        self._routers = {id(weight) for name, weight in weights.items() if name.endswith("mlp.gate.weight")}
        self.logits: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.linear and id(args[1]) in self._routers:
            self.logits.append(out)
        return out


def token_outputs(weights: Weights, config: Config, tokens: np.ndarray, experts: np.ndarray | None = None):
    """(log-probability of each next token [L-1], exact entropy [L-1], by MoE layer router logits [L-1, E] and chosen
    experts [L-1, top-k])."""
    with RouterLogits(weights) as router:
        logits, routes = bailing_forward(weights, config, tokens[:-1].tolist(), dtype=torch.float64,
                                         experts=None if experts is None else torch.from_numpy(experts).unbind(1))
    logprobs_LV = torch.log_softmax(logits / cases.TEMPERATURE, -1)
    chosen_L = logprobs_LV.gather(1, torch.from_numpy(tokens[1:, None]))[:, 0]
    return chosen_L, -(logprobs_LV.exp() * logprobs_LV).sum(-1), router.logits, routes


def fill_logprobs(step: cases.Step, weights: Weights, config: Config, seed: int = 11) -> None:
    """Old and reference log-probabilities near the policy's own, so that some ratios are clipped and some are not."""
    rng = np.random.default_rng(seed)
    for tokens, experts in zip(step.token_ids, experts_of(step), strict=True):
        with torch.no_grad():
            own = token_outputs(weights, config, tokens, experts)[0].numpy()
        for store, deviation in ((step.old_logprobs, 0.25), (step.ref_logprobs, 0.5)):
            noisy = own + rng.normal(0.0, deviation, len(own))
            store.append(np.concatenate([[0.0], noisy]).astype(np.float32))


def experts_of(step: cases.Step) -> list[np.ndarray | None]:
    return [None] * len(step.token_ids) if step.routed_experts is None else step.routed_experts


def ratios(log_ratio: torch.Tensor, mask: torch.Tensor, surrogate: str) -> torch.Tensor:
    """new / old at each token [L-1]; for gspo and lpo the geometric mean over its response or its sentence."""
    if surrogate == "ppo":
        return log_ratio.exp()
    sentence_L = torch.arange(1, 1 + len(mask)) // (cases.TOKENS_PER_SENTENCE if surrogate == "lpo" else 1 + len(mask))
    means = [log_ratio[mask & (sentence_L == number)].mean() for number in sentence_L]
    return torch.stack(means).exp()


def step_loss(step: cases.Step, weights: Weights, config: Config,
              surrogate_name: str = "ppo") -> tuple[torch.Tensor, dict[str, float]]:
    """The whole step's loss (spec Eq. 2, 5, 6) and what it is made of."""
    surrogate, kl, entropy = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    router: list[list[torch.Tensor]] = []
    chosen: list[list[torch.Tensor]] = []
    for index, (tokens, experts) in enumerate(zip(step.token_ids, experts_of(step), strict=True)):
        new, token_entropy, layers, routes = token_outputs(weights, config, tokens, experts)
        router.append(layers)
        chosen.append(routes)
        mask = torch.from_numpy(step.loss_mask[index][1:])
        old = torch.from_numpy(step.old_logprobs[index][1:]).double()
        ref = torch.from_numpy(step.ref_logprobs[index][1:]).double()
        advantage = float(np.float32(step.advantages[index]))
        ratio = ratios(new - old, mask, surrogate_name)
        clipped = ratio.clamp(1 - cases.LOSS.clip_eps_low, 1 + cases.LOSS.clip_eps_high)
        surrogate = surrogate + torch.minimum(ratio * advantage, clipped * advantage)[mask].sum()
        kl = kl + ((ref - new).exp() - (ref - new) - 1)[mask].sum()
        entropy = entropy + token_entropy[mask].sum()
    loss = -(surrogate - cases.LOSS.kl_coef * kl + cases.LOSS.entropy_coef * entropy) / cases.PHI

    balance, z_loss = router_losses([torch.cat(layer) for layer in zip(*router, strict=True)], config,
                                    [torch.cat(layer) for layer in zip(*chosen, strict=True)])
    moe_layers = max(1, len(router[0]))
    count = sum(int(mask[1:].sum()) for mask in step.loss_mask)
    report = {"train/loss": loss, "train/kl": kl / count, "train/entropy": entropy / count,
              "train/policy_loss": -surrogate / count, "train/selected_tokens": torch.tensor(float(count)),
              "train/balance_loss": balance / moe_layers, "train/z_loss": z_loss / moe_layers}
    report = {key: value.item() for key, value in report.items()}
    return loss + cases.BALANCE_COEF * balance + cases.Z_LOSS_COEF * z_loss, report


def router_losses(logits_by_layer: list[torch.Tensor], config: Config,
                  chosen_by_layer: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(balance, z) summed over layers, each a mean over all tokens of the step (the formulas of model/router.py).

    chosen_by_layer: the experts that the tokens take, int64 [T, top-k]. None: the best by the logits.
    """
    balance = z_loss = torch.zeros((), dtype=torch.float64)
    for layer, logits_TE in enumerate(logits_by_layer):
        tokens, experts = logits_TE.shape
        top_k = config["num_experts_per_tok"]
        chosen_Tk = logits_TE.topk(top_k, -1).indices if chosen_by_layer is None else chosen_by_layer[layer]
        fraction_E = F.one_hot(chosen_Tk, experts).double().sum((0, 1)) / (tokens * top_k)
        balance = balance + experts * (fraction_E * probabilities(logits_TE, config).sum(0)).sum() / tokens
        z_loss = z_loss + logits_TE.logsumexp(-1).square().sum() / tokens
    return balance, z_loss


def probabilities(logits_TE: torch.Tensor, config: Config) -> torch.Tensor:
    """The router's: softmax, or sigmoids divided by their sum."""
    if not scores_by_sigmoid(config):
        return logits_TE.softmax(-1)
    return logits_TE.sigmoid() / logits_TE.sigmoid().sum(-1, keepdim=True)


def reference_step(step: cases.Step, start: Weights, config: Config) -> Reference:
    """Gradients of the step, then clipping by the global norm and one step of torch.optim.AdamW."""
    weights = {name: tensor.double().requires_grad_() for name, tensor in start.items() if not is_frozen(name)}
    frozen = {name: tensor.double() for name, tensor in start.items() if is_frozen(name)}
    loss, report = step_loss(step, weights | frozen, config)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in weights.items()}
    surrogates = {}
    for surrogate in cases.SURROGATES:
        other = torch.autograd.grad(step_loss(step, weights | frozen, config, surrogate)[0], list(weights.values()))
        surrogates[surrogate] = dict(zip(weights, other, strict=True))

    options = cases.OPTIMIZER
    # Megatron does not decay vectors (norm weights)
    groups = [{"params": [w for w in weights.values() if w.dim() > 1], "weight_decay": options["weight_decay"]},
              {"params": [w for w in weights.values() if w.dim() == 1], "weight_decay": 0.0}]
    grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), options["clip_grad"])
    torch.optim.AdamW(groups, lr=cases.LEARNING_RATE, betas=(options["beta1"], options["beta2"]),
                      eps=options["eps"]).step()
    updated = {name: weight.detach().clone() for name, weight in (weights | frozen).items()}
    return Reference({n: t.double() for n, t in start.items()}, gradients, updated, float(grad_norm), report,
                     surrogates)


def distilled_gradients(step: cases.Step, start: Weights, configs: Mapping[bool, Config], *, top_k_of: str,
                        divergence: str) -> Weights:
    """Gradients of the dense term alone: the KL over the k tokens and the rest. configs: with NormHead and without."""
    weights = {name: tensor.double().requires_grad_() for name, tensor in start.items() if not is_frozen(name)}
    frozen = {name: tensor.double() for name, tensor in start.items() if is_frozen(name)}
    loss = torch.zeros((), dtype=torch.float64)
    for tokens, mask in zip(step.token_ids, step.loss_mask, strict=True):
        student, teacher = (torch.log_softmax(bailing_forward(
            weights | frozen, configs[norm_head], tokens[:-1].tolist(), dtype=torch.float64)[0] / cases.TEMPERATURE, -1)
            for norm_head in (True, False))
        ids = (student if top_k_of == "student" else teacher).topk(cases.TOP_K, -1).indices
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (
            student.gather(1, ids).exp(), teacher.detach().gather(1, ids).exp()))
        p, q = (p, q) if divergence == "reverse" else (q, p)
        loss = loss + (p * (p / q).log()).sum(-1)[torch.from_numpy(mask[1:])].sum() / cases.PHI
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
