"""Which low-rank adapters a network has: their Slots, and what of model.lora it cannot take. No megatron here.

The linear with weight W [out, in] gets A [r, in] and B [out, r]: it computes W x + scale * B A x. Query, key and value
(gate and up) are one linear of Megatron, so they share A.

- A column-parallel linear (W cut by rows) has a whole A on every rank, and B is cut as W is.
- A row-parallel linear (W cut by columns) has A cut as W is, and a whole B on every rank.
- What leads down to a latent vector is whole on every rank, and so are its A and B.

The rank is never cut, so it need not divide by anything.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from megatron_rl.config.lora import TARGETS, LoraConfig
from megatron_rl.config.rules import require
from megatron_rl.config.schema import ModelConfig
from megatron_rl.model.backend import GROUPED_BYTES, resolve
from megatron_rl.model.network import Network
from megatron_rl.model.slots import Slot, network_slots

SHARED = {"linear_fc1": "A", "linear_fc2": "B"}
"""The matrix at the hidden size, which the experts of a layer share with model.lora.experts=shared_outer."""
ENGINE_MODULES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""Beside which SGLang 0.5.23 puts adapters, of those that our families have (sglang/srt/utils/common.py:
SUPPORTED_LORA_TARGET_MODULES)."""
ENGINE_WIDTH = 32
"""An engine on a CPU pads widths to a multiple of it (sglang/srt/configs/update_config.py:
adjust_config_with_unaligned_cpu_tp)."""
ENGINE_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class AdapterSlots:
    """linear: its Megatron name. base: the Slot of its weight. a, b: those of the adapter's matrices."""

    linear: str
    base: Slot
    a: Slot
    b: Slot


def adapter_slots(network: Network, lora: LoraConfig) -> Iterator[AdapterSlots]:
    """The adapters of the whole network, in order. Experts that share a matrix have equal Slots of it."""
    for name, base in network_slots(network).items():
        linear, _, kind = name.rpartition(".")
        target, expert = linear.rpartition(".")[2], base.over == "etp"
        if kind != "weight" or target not in lora.targets or (expert and lora.experts == "none"):
            continue
        shared = SHARED[target] if expert and lora.experts == "shared_outer" else None
        names = tuple(each.removesuffix(".weight") for each in base.names)
        a = Slot((f"{names[0]}.lora_A.weight",), ((lora.rank, base.parts[0][1]),),
                 "columns" if base.cut == "columns" else "none", base.over)
        b = Slot(tuple(f"{each}.lora_B.weight" for each in names), tuple((part[0], lora.rank) for part in base.parts),
                 "rows" if base.cut == "rows" else "none", base.over, base.groups)
        if shared is not None:
            a, b = (_of_all(each) if letter == shared else each for letter, each in (("A", a), ("B", b)))
        yield AdapterSlots(linear, base, a, b)


def _of_all(slot: Slot) -> Slot:
    """The matrix as one of all experts of the layer: its name has no expert's number."""
    return Slot((_EXPERT.sub(".experts.", slot.key),), slot.parts, "none", "tp")


def matrix_slots(network: Network, lora: LoraConfig) -> dict[str, Slot]:
    """Megatron parameter -> Slot of every matrix, as network_slots has those of weights."""
    found: dict[str, Slot] = {}
    for each in adapter_slots(network, lora):
        experts = each.linear.partition(".local_experts.")[0]
        target = each.linear.rpartition(".")[2]
        for letter, slot in (("A", each.a), ("B", each.b)):
            shared = each.base.over == "etp" and slot.over == "tp"
            found[f"{experts}.lora.{target}_{letter}" if shared else f"{each.linear}.lora.{letter}"] = slot
    return found


def adapted_modules(network: Network, lora: LoraConfig) -> set[str]:
    """The last words of the checkpoint's names of the modules that get adapters, e.g. q_proj."""
    return {name.split(".")[-2] for each in adapter_slots(network, lora) for name in each.base.names}


def check_served(lora: LoraConfig, network: Network) -> None:
    """ValueError, naming the key, if engines cannot serve these adapters (rollout.publish=adapter)."""
    instead = "use rollout.publish=tensor, broadcast or disk, which send the merged weights"
    require(lora.on, f"rollout.publish=adapter sends adapters, and model.lora.rank=0 trains all weights; {instead}")
    strange = sorted(adapted_modules(network, lora) - ENGINE_MODULES)
    require(not strange, f"rollout.publish=adapter: SGLang 0.5.23 has no adapters for {' and '.join(strange)} of "
            f"{network.model_type}; {instead}")
    require(network.model_type in ENGINE_FAMILIES, f"rollout.publish=adapter: SGLang 0.5.23 was tried with adapters of "
            f"{', '.join(ENGINE_FAMILIES)}, and not of {network.model_type}; {instead}")
    mlp = [target for target in lora.targets if target in SHARED]
    require(not (network.num_experts and mlp), f"rollout.publish=adapter with {' and '.join(mlp)} in "
            "model.lora.targets: of a network with experts SGLang 0.5.23 was tried with adapters of attention alone. "
            f"Set model.lora.targets=[linear_qkv,linear_proj], or {instead}")
    require(not mlp or network.intermediate_size % ENGINE_WIDTH == 0,
            f"rollout.publish=adapter with {' and '.join(mlp)} in model.lora.targets: on a CPU SGLang 0.5.23 pads the "
            f"intermediate_size={network.intermediate_size} of this {network.model_type} to a multiple of "
            f"{ENGINE_WIDTH}, and ends over adapters of another size. Leave these targets out, or {instead}")


def check_lora(options: ModelConfig, network: Network, *, gpu: bool) -> None:
    """ValueError, naming the key, if the network or another option cannot take these adapters."""
    lora, backend = options.lora, resolve(options, gpu=gpu)
    if not lora.on:
        return
    require(backend.name != "transformer_engine",
            "model.lora: adapters are built beside Megatron's own linears, which model.backend=transformer_engine "
            "replaces; use model.backend=torch or megatron")
    require(options.expert_bias_rate == 0, f"model.expert_bias_rate={options.expert_bias_rate}: model.lora freezes all "
            "of model.path, and an adapter folder has no place for a bias; set it to 0")
    linears = {name.split(".")[-2] for name in network_slots(network) if name.endswith(".weight")}
    for target in lora.targets:
        require(target in linears, f"model.lora.targets={','.join(lora.targets)}: this {network.model_type} has no "
                f"{target}; leave it out, it has {', '.join(each for each in TARGETS if each in linears)}")
    reached = {each.linear.split(".")[2] for each in adapter_slots(network, lora)}
    bare = [layer for layer in range(network.num_hidden_layers) if str(layer) not in reached]
    require(not bare, f"model.lora.targets={','.join(lora.targets)} with model.lora.experts={lora.experts} puts no "
            f"adapter into layer {min(bare, default=0)} of this {network.model_type}, and every layer needs one; add "
            "linear_qkv or linear_proj")
    require(lora.experts != "shared_outer" or (network.num_experts > 0 and not SHARED.keys().isdisjoint(lora.targets)),
            f"model.lora.experts=shared_outer with model.lora.targets={','.join(lora.targets)}: no routed expert of "
            f"this {network.model_type} has an adapter that could share a matrix; leave model.lora.experts out")
    if network.num_experts and lora.experts != "none":
        experts = backend.kernels.experts
        require(experts not in ("triton", "reference"), f"model.kernels.experts={experts} has no adapters; use "
                "grouped_mm, loop or megatron, or model.lora.experts=none")
        unit = GROUPED_BYTES // (2 if options.dtype == "bfloat16" else 4)
        require(experts != "grouped_mm" or lora.rank % unit == 0,
                f"model.lora.rank={lora.rank}: the grouped product of the experts wants multiples of {unit} in "
                f"{options.dtype}; use one, or model.kernels.experts=megatron")


def needs_reference_copy(options: ModelConfig) -> bool:
    """Whether the KL term's frozen policy is a second copy of the weights. With adapters it is the same weights with
    the adapters off, unless model.reference_path names others."""
    return not options.lora.on or options.reference_path is not None


def count_trained(network: Network, lora: LoraConfig) -> int:
    """Parameters that train: all, or those of the adapters."""
    slots = matrix_slots(network, lora).values() if lora.on else network_slots(network).values()
    return sum(prod(part) for slot in slots if slot.frozen_dtype is None for part in slot.parts)


def initial(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A whole matrix at the start, fp32, the same in every layout: A uniform up to 1 / sqrt(inputs), as peft draws it;
    B zero, so that the network begins as that of model.path."""
    if key.endswith("lora_B.weight"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7]))
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
