"""Layouts in which Transformer Engine's layers are built (te_ranks.py), and one tiny network of each family that
model.backend=transformer_engine takes: those without latent attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_rl.model.architectures import parse_config
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.fresh import bailing_config
from megatron_rl.model.network import Network
from megatron_rl.model.slots import expected_shapes, frozen_names

LAYOUTS: dict[str, dict[str, int]] = {
    "one": {"world_size": 1},
    "dp2": {"world_size": 2},
    "tp2": {"world_size": 2, "tp": 2},
    "ep2": {"world_size": 2, "ep": 2},
    "tp2_ep2": {"world_size": 2, "tp": 2, "ep": 2},
    "tp2_etp2": {"world_size": 2, "tp": 2, "etp": 2},
    "pp2_vpp2": {"world_size": 2, "pp": 2, "vpp": 2},
    "cp2": {"world_size": 2, "cp": 2},
}
TRAVELLERS = ("bailing_moe", "qwen3")
"""Networks whose training state goes through checkpoints: dense layers, experts, shared experts; norms of the heads."""
RESTORED_IN = {"ep2": "tp2_ep2", "dp2": "pp2_vpp2"}
"""Layout of a checkpoint -> another layout in which it is restored too, under the other backend."""


def config_of(name: str) -> dict[str, Any]:
    """config.json of a family's tiny network, four layers in bfloat16; a bailing_moe has a dense layer too."""
    keys = {"model_type": name, **FAMILIES[name].tiny, "num_hidden_layers": 4, "torch_dtype": "bfloat16"}
    if keys.get("num_experts_per_tok") == 2 and "num_experts" in keys:
        keys["num_experts"] = 4
    return bailing_config(**{**keys, "first_k_dense_replace": 1}) if name == "bailing_moe" else keys


def networks_in(layout: str) -> list[str]:
    """Families whose network the layout can hold: a dense one has no experts to spread."""
    spreads = LAYOUTS[layout].get("ep", 1) * LAYOUTS[layout].get("etp", 1) > 1
    return [name for name in FAMILIES
            if not network_of(name).kv_lora_rank and (not spreads or network_of(name).num_experts)]


def network_of(name: str) -> Network:
    return parse_config(config_of(name), name)


def write_model(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """folder/NAME: a checkpoint of random numbers, which it returns."""
    generator = torch.Generator().manual_seed(len(name))
    in_float32 = frozen_names(network_of(name))
    tensors = {tensor: torch.randn(shape, generator=generator).to(
                   torch.float32 if tensor in in_float32 else torch.bfloat16)
               for tensor, shape in expected_shapes(network_of(name)).items()}
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(json.dumps(config_of(name)))
    save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return tensors
