"""Network: a decoder-only checkpoint in the same words whatever its model_type calls them; no megatron here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from megatron_rl.config.schema import ParallelConfig


@dataclass(frozen=True)
class Network:
    """A pre-norm decoder with RMSNorm, rotary grouped-query attention and SiLU-gated dense or expert MLPs.

    model_type: the family (families/) that names its keys and tensors. num_experts 0: every layer is dense.
    intermediate_size: width of a dense layer's MLP; moe_intermediate_size: of one expert. first_k_dense_replace:
    that many leading layers are dense. rope_factor: positions are divided by it (linear rope_scaling).
    qk_norm: RMSNorm of each query and key head before the rotation. norm_head: the head's columns are divided
    by their norm over the vocabulary.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_factor: float
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    first_k_dense_replace: int = 0
    norm_head: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one MLP that holds all shared experts."""
        return self.moe_intermediate_size * self.num_shared_experts

    def is_dense_layer(self, layer: int) -> bool:
        return self.num_experts == 0 or layer < self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        return sum(not self.is_dense_layer(layer) for layer in range(self.num_hidden_layers))


_MAY_BE_ZERO = {"intermediate_size", "num_experts", "num_experts_per_tok", "num_shared_experts",
                "moe_intermediate_size", "first_k_dense_replace", "initializer_range"}


def check_types(values: Mapping[str, Any], where: str) -> None:
    """ValueError, naming the key, unless each of Network's fields in `values` has its type and a size that can be."""
    hints = get_type_hints(Network)
    for key, value in values.items():
        number = type(value) is int or (type(value) is float and hints[key] is float and math.isfinite(value))
        fits = number and (value > 0 or (value == 0 and key in _MAY_BE_ZERO)) if hints[key] in (int, float) else \
            type(value) is hints[key]
        if not fits:
            size = "" if hints[key] not in (int, float) else " of at least 0" if key in _MAY_BE_ZERO else " above 0"
            raise ValueError(f"{where}: {key}={json.dumps(value)} must be {hints[key].__name__}{size}")


def check_network(network: Network, where: str) -> None:
    """ValueError, naming the key, for a network that Megatron, SGLang or transformers refuses or takes otherwise."""
    experts, top, layers = network.num_experts, network.num_experts_per_tok, network.num_hidden_layers
    rules = (
        (network.num_attention_heads % network.num_key_value_heads == 0,
         f"num_key_value_heads={network.num_key_value_heads} does not divide "
         f"num_attention_heads={network.num_attention_heads}"),
        (network.head_dim % 2 == 0, f"head_dim={network.head_dim} must be even (rotary embedding)"),
        (not experts or 1 <= top <= experts, f"num_experts_per_tok={top} must be in 1..num_experts={experts}"),
        (not experts or network.moe_intermediate_size > 0, "moe_intermediate_size=0: experts have a width"),
        (not (top == 1 and network.norm_topk_prob and experts),
         "num_experts_per_tok=1 with norm_topk_prob=true is not supported: the one weight divided by itself is 1, so "
         "that the router would learn nothing, and the published bailing_moe does not divide it"),
        (not experts or network.first_k_dense_replace < layers,
         f"first_k_dense_replace={network.first_k_dense_replace} leaves no layer of num_hidden_layers={layers} with "
         "experts"),
        (network.intermediate_size > 0 or network.num_moe_layers == layers, "intermediate_size=0: dense layers have a "
         "width"),
        (not (network.norm_head and network.tie_word_embeddings),
         "tie_word_embeddings=true with norm_head=true is not supported: the engine would use the embedding as it is"),
    )
    for holds, message in rules:
        if not holds:
            raise ValueError(f"{where}: {message}")


def check_layout(network: Network, parallel: ParallelConfig) -> None:
    """Raise ValueError, naming the key, when a parallel size does not divide what it splits."""
    for key, size in (("ep", parallel.ep), ("etp", parallel.etp)):
        if size > 1 and network.num_experts == 0:
            raise ValueError(f"parallel.{key}={size} splits experts, but this {network.model_type} network has none")
    has_dense_layers = network.num_moe_layers < network.num_hidden_layers
    rules = (
        ("tp", parallel.tp, "num_attention_heads", network.num_attention_heads),
        ("tp", parallel.tp, "num_key_value_heads", network.num_key_value_heads),
        ("tp", parallel.tp, "vocab_size", network.vocab_size),
        ("tp", parallel.tp, "intermediate_size", network.intermediate_size if has_dense_layers else 0),
        ("tp", parallel.tp, "num_shared_experts*moe_intermediate_size", network.shared_intermediate_size),
        ("etp", parallel.etp, "moe_intermediate_size", network.moe_intermediate_size),
        ("ep", parallel.ep, "num_experts", network.num_experts),
        ("pp", parallel.pp * (parallel.vpp or 1), "num_hidden_layers", network.num_hidden_layers),
    )
    for key, size, name, total in rules:
        if total % size:
            shown = f"pp*vpp={size}" if key == "pp" and parallel.vpp else f"{key}={size}"
            fitting = ", ".join(str(value) for value in range(1, min(total, 4 * size) + 1) if total % value == 0)
            raise ValueError(f"parallel.{shown} does not divide {name}={total}; {fitting} would")
