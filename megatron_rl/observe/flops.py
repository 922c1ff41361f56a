"""Model FLOPs of a network: what the mathematics needs, whatever the hardware repeats or pads.

One multiply-add is 2 FLOPs. With hidden h, q and kv heads of width d, E experts of which k are active, expert
width m, shared experts of width s together, dense width f and vocabulary V, one token costs forward

    per layer  attention projections  2 h (q + 2 kv) d + 2 q d h
               MoE                    2 h E + 6 h (m k + s)         (router; gate, up and down projection)
               or dense               6 h f                         (is_dense)
    once       output head            2 h V
    per pair of a query and a key it sees, per layer:  4 q d        (scores and their weighted sum of values)

With latent attention of ranks r (queries; 0: none) and c (keys and values), heads of d = n + p for queries and keys
(p rotate) and of v for values:

    attention projections  2 h q d, or 2 h r + 2 r q d;  2 h (c + p) + 2 c q (n + v) + 2 q v h
    per pair               2 q (d + v)

The layer behind the last of model.mtp costs what a MoE layer and the head cost, and 4 h h for its projection.

A causal sequence of L tokens has L (L + 1) / 2 such pairs. The backward pass costs twice the forward pass, and of a
frozen matrix as much as the forward pass. Embedding lookup, norms, RoPE, softmax and activation recomputation are not
counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def is_dense(network: Mapping[str, Any], layer: int) -> bool:
    """Whether layer `layer` (from 0) has an MLP instead of experts. network: the fields of model.network.Network."""
    return network["num_experts"] == 0 or layer < network["first_k_dense_replace"]


def shared_width(network: Mapping[str, Any]) -> int:
    """Width of the one MLP that holds all shared experts. network: the fields of model.network.Network."""
    one = network.get("shared_expert_intermediate_size") or network["moe_intermediate_size"]
    return one * network["num_shared_experts"]


def linear_flops_per_token(config: Mapping[str, Any]) -> int:
    """Forward FLOPs of one token outside the attention scores. config: the fields of model.network.Network."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    dense_layers = sum(is_dense(config, layer) for layer in range(layers))
    attention = _latent_projections(config) if config.get("kv_lora_rank") else _projections(config)
    active_width = config["num_experts_per_tok"] * config["moe_intermediate_size"] + shared_width(config)
    moe = 2 * hidden * config["num_experts"] + 6 * hidden * active_width
    dense = 6 * hidden * config["intermediate_size"]
    head = 2 * hidden * config["vocab_size"]
    return layers * attention + (layers - dense_layers) * moe + dense_layers * dense + head


def forward_flops(config: Mapping[str, Any], sequence_lengths: Iterable[int]) -> int:
    """Forward FLOPs of a batch of causal sequences, each of the given number of tokens."""
    tokens, pairs = 0, 0
    for length in sequence_lengths:
        tokens += length
        pairs += length * (length + 1) // 2
    return tokens * linear_flops_per_token(config) + pairs * _flops_per_pair(config)


def train_flops(config: Mapping[str, Any], sequence_lengths: Iterable[int], *, frozen: bool = False,
                mtp: bool = False) -> int:
    """Forward and backward FLOPs of a batch of causal sequences: three times the forward pass.

    frozen: with model.lora a matrix has no gradient of its own, half of its backward pass. The adapters' products are
    not counted. mtp: with the layer behind the last, whose frozen head has no gradient of its own either.
    """
    lengths = list(sequence_lengths)
    whole = 3 * forward_flops(config, lengths)
    if mtp:
        layer = {**config, "num_hidden_layers": 1, "first_k_dense_replace": 0}
        hidden, tokens = config["hidden_size"], sum(lengths)
        whole += 3 * (forward_flops(layer, lengths) + tokens * 4 * hidden * hidden)
        whole -= tokens * 2 * hidden * config["vocab_size"]  # of the frozen head
    return whole - sum(lengths) * linear_flops_per_token(config) if frozen else whole


def attention_balance_tokens(config: Mapping[str, Any]) -> float:
    """Length of a causal sequence, in tokens, whose attention scores cost as much as everything else in it."""
    return 2 * linear_flops_per_token(config) / _flops_per_pair(config)


def _projections(config: Mapping[str, Any]) -> int:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return 2 * config["hidden_size"] * (2 * heads + 2 * kv_heads) * _head_dim(config)


def _latent_projections(config: Mapping[str, Any]) -> int:
    hidden, heads, latent, queries = (config[key] for key in (
        "hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank"))
    still, rotating, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    query = heads * _head_dim(config)
    to_query = hidden * queries + queries * query if queries else hidden * query
    return 2 * (to_query + hidden * (latent + rotating) + latent * heads * (still + value) + heads * value * hidden)


def _flops_per_pair(config: Mapping[str, Any]) -> int:
    head_dim = _head_dim(config)
    return 2 * config["num_attention_heads"] * (head_dim + (config.get("v_head_dim") or head_dim)) \
        * config["num_hidden_layers"]


def _head_dim(config: Mapping[str, Any]) -> int:
    """head_dim, or hidden / heads where the checkpoint leaves it out or null (spec: BailingMoe configuration)."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
