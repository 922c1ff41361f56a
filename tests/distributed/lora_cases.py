"""Adapters that pass through the layouts, and their gradients in float64 by the chain rule from those of W + BA."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

import tests.distributed.cases as cases
from megatron_rl.config.lora import LoraConfig
from megatron_rl.model.adapters import AdapterSlots, adapter_slots
from megatron_rl.model.architectures import read_config
from megatron_rl.model.network import Network
from tests.distributed.networks import WrittenNetwork
from tests.distributed.reference_step import fill_logprobs, reference_step

LORA_STEP = "lora.pt"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoraCase:
    """network: of networks.py."""

    network: str
    lora: LoraConfig


LORA_CASES = {
    "own": LoraCase("bailing_v2", LoraConfig(rank=4, alpha=8.0)),
    "shared_outer": LoraCase("qwen3_moe", LoraConfig(rank=4, alpha=6.0, experts="shared_outer")),
    "latent": LoraCase("deepseek_v2", LoraConfig(
        rank=4, alpha=8.0, targets=("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj",
                                    "linear_kv_up_proj", "linear_proj"), experts="none")),
    "latent_query": LoraCase("deepseek_v3", LoraConfig(
        rank=3, alpha=6.0, targets=("linear_q_proj", "linear_kv_down_proj", "linear_kv_up_proj"), experts="none")),
    "attention": LoraCase("bailing_bias", LoraConfig(rank=3, alpha=6.0, targets=("linear_qkv",), experts="none")),
}
"""bailing_v2 has a dense layer and shared experts; qwen3_moe has query, key and value as tensors of their own;
bailing_bias has them in one with biases, and its embedding is also its head; deepseek_v2 has a latent query and
deepseek_v3 has not. Rank 3 divides by nothing."""


LORA_LAYOUTS = ("one", "dp2", "ep2", "tp2", "tp2_ep2", "tp2_etp2", "pp2", "pp2_vpp2", "cp2", "tp2_pp2_ep2",
                "tp2_cp2_ep2")
LATENT_LAYOUTS = ("tp2_ep2", "cp2")
WITH_VARIANTS = {("tp2_ep2", "own"), ("pp2", "shared_outer")}
"""Where each of cases.VARIANTS takes a step too."""


def cases_in(layout: str) -> dict[str, LoraCase]:
    return {name: case for name, case in LORA_CASES.items()
            if layout in (LATENT_LAYOUTS if name.startswith("latent") else LORA_LAYOUTS)}


def drawn_matrix(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A whole matrix of an adapter, neither of them zero."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.15


class LoraReference:
    """What one case must give: float64, under the names that Exporter gives."""

    def __init__(self, folder: Path, written: WrittenNetwork, case: LoraCase):
        network = read_config(written.checkpoint)
        self.lora, self._slots = case.lora, list(adapter_slots(network, case.lora))
        self.start = {name: drawn_matrix(name, shape).double() for each in self._slots
                      for slot in (each.a, each.b) for name, shape in slot.shapes.items()}
        self.base = {name: tensor.double() for name, tensor in written.weights.items()}
        self.merged = self._merged(network)
        step = cases.draw_sequences()
        fill_logprobs(step, self.merged, written.config)
        torch.save(step, folder / case.network / LORA_STEP)
        self.step, self.config = step, written.config
        whole = reference_step(step, {name: each.clone() for name, each in self.merged.items()}, written.config)
        self.report = whole.report
        self.gradients = self._chain(whole.gradients)
        self.grad_norm = float(torch.stack([each.norm() for each in self.gradients.values()]).norm())
        self.updated = self._updated()

    def _parts(self, each: AdapterSlots, tensors: Tensors) -> torch.Tensor:
        return torch.cat([tensors[name] for name in each.base.names])

    def _b(self, each: AdapterSlots) -> torch.Tensor:
        return torch.cat([self.start[name] for name in each.b.names])

    def _merged(self, network: Network) -> Tensors:
        merged = dict(self.base)
        for each in self._slots:
            whole = self._parts(each, self.base) + self.lora.scale * self._b(each) @ self.start[each.a.key]
            sizes = [self.base[name].shape[0] for name in each.base.names]
            merged |= dict(zip(each.base.names, whole.split(sizes), strict=True))
        return merged

    def _chain(self, gradients: Tensors) -> Tensors:
        """dA = scale * B^T dW and dB = scale * dW A^T, added over the experts that share a matrix."""
        found: Tensors = {}
        for each in self._slots:
            whole, a = self._parts(each, gradients), self.start[each.a.key]
            sizes = [self.start[name].shape[0] for name in each.b.names]
            b = (self.lora.scale * whole @ a.T).split(sizes)
            for name, value in [(each.a.key, self.lora.scale * self._b(each).T @ whole),
                                *zip(each.b.names, b, strict=True)]:
                found[name] = found[name] + value if name in found else value
        return found

    def _updated(self) -> Tensors:
        """Clipped by the norm over all adapters, and one step of torch's AdamW."""
        options, weights = cases.OPTIMIZER, {name: each.clone() for name, each in self.start.items()}
        for name, weight in weights.items():
            weight.grad = self.gradients[name] * min(1.0, options["clip_grad"] / (self.grad_norm + 1e-6))
        torch.optim.AdamW(weights.values(), lr=cases.LEARNING_RATE, betas=(options["beta1"], options["beta2"]),
                          eps=options["eps"], weight_decay=options["weight_decay"]).step()
        return weights
