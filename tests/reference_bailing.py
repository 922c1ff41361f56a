"""A plain-torch forward pass for one sequence, from the checkpoint's point of view: BailingMoe and its relatives.

The others differ from it by names, by query and key norms, by the part of a head that rotates, by how the router scores
and chooses, by a gate on the shared experts, and by having no experts. Independent of Megatron and SGLang; both are
tested against it. L tokens, V vocabulary, H hidden, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

NORM_HEAD_EPS = 1e-7
BIASES = ("expert_bias", "e_score_correction_bias")
"""What a router's bias for its choice is called. No gradient reaches it."""


def is_frozen(name: str) -> bool:
    return name.endswith(BIASES)


def scores_by_sigmoid(config: Mapping[str, Any]) -> bool:
    return config["model_type"] in ("bailing_moe_v2", "glm4_moe", "deepseek_v3")


def bailing_logits(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], token_ids: Sequence[int], *,
    dtype: torch.dtype = torch.float32, experts: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits [L, V] in `dtype`, differentiable in `weights`. weights: checkpoint names -> tensors."""
    return bailing_forward(weights, config, token_ids, dtype=dtype, experts=experts)[0]


def bailing_forward(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], token_ids: Sequence[int], *,
    dtype: torch.dtype = torch.float32, experts: Sequence[torch.Tensor] | None = None, mtp: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logits [L, V], experts chosen in each MoE layer, int64 [L, top-k], best first, or `experts` when given).

    mtp: the logits [L-1, V] are those of the layer behind the last instead, whose row t is about token t+2.
    """

    def weight(name: str) -> torch.Tensor:
        return weights[name].to(dtype)

    def rms_norm(x_LH: torch.Tensor, name: str) -> torch.Tensor:
        return x_LH * torch.rsqrt(x_LH.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight(name)

    def mlp(x_LH: torch.Tensor, prefix: str) -> torch.Tensor:
        gate = F.linear(x_LH, weight(f"{prefix}.gate_proj.weight"))
        up = F.linear(x_LH, weight(f"{prefix}.up_proj.weight"))
        return F.linear(F.silu(gate) * up, weight(f"{prefix}.down_proj.weight"))

    def moe(x_LH: torch.Tensor, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        logits_LE = F.linear(x_LH, weight(f"{prefix}.gate.weight"))
        bias_E = next((weight(name) for name in (f"{prefix}.gate.{bias}" for bias in BIASES) if name in weights), None)
        scores_LE = torch.sigmoid(logits_LE) if scores_by_sigmoid(config) else F.softmax(logits_LE, dim=-1)
        top_k = config["num_experts_per_tok"]
        experts_Lk = choose(scores_LE, bias_E) if experts is None else experts[len(routes)]
        gates_Lk = scores_LE.gather(1, experts_Lk)
        if config.get("norm_topk_prob", True) and top_k > 1:
            gates_Lk = gates_Lk / gates_Lk.sum(-1, keepdim=True)
        gates_Lk = gates_Lk * config.get("routed_scaling_factor", 1.0)
        gates_LE = torch.zeros_like(scores_LE).scatter(1, experts_Lk, gates_Lk)
        out_LH = torch.zeros_like(x_LH)
        for expert in range(num_experts):
            rows = (experts_Lk == expert).any(-1).nonzero().squeeze(-1)
            routed = mlp(x_LH[rows], f"{prefix}.experts.{expert}") * gates_LE[rows, expert, None]
            out_LH = out_LH.index_add(0, rows, routed)
        for shared in ("shared_experts", "shared_expert"):
            if f"{prefix}.{shared}.up_proj.weight" in weights:
                gate = f"{prefix}.{shared}_gate.weight"
                share = torch.sigmoid(F.linear(x_LH, weight(gate))) if gate in weights else 1.0
                out_LH = out_LH + share * mlp(x_LH, f"{prefix}.{shared}")
        return out_LH, experts_Lk

    def choose(scores_LE: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        """int64 [L, top-k]: the best by score plus bias, of the groups whose two best are best together. With softmax:
        of those that have the best ones."""
        ranked_LE = scores_LE if bias_E is None else scores_LE + bias_E
        groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
        if chosen < groups:
            by_group = ranked_LE.unflatten(-1, (groups, -1))
            ranks = by_group.topk(2 if scores_by_sigmoid(config) else 1, -1).values.sum(-1)
            kept = ranks >= ranks.topk(chosen, -1).values[:, -1:]
            ranked_LE = by_group.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        return ranked_LE.topk(config["num_experts_per_tok"], dim=-1).indices

    def latent_attention(x_LH: torch.Tensor, prefix: str) -> torch.Tensor:
        heads, still = config["num_attention_heads"], config["qk_nope_head_dim"]
        query = linear(rms_norm(linear(x_LH, f"{prefix}.q_a_proj"), f"{prefix}.q_a_layernorm.weight"),
                       f"{prefix}.q_b_proj") if config["q_lora_rank"] else linear(x_LH, f"{prefix}.q_proj")
        query = query.unflatten(-1, (heads, -1))
        latent, shared = linear(x_LH, f"{prefix}.kv_a_proj_with_mqa").tensor_split([config["kv_lora_rank"]], -1)
        expanded = linear(rms_norm(latent, f"{prefix}.kv_a_layernorm.weight"), f"{prefix}.kv_b_proj")
        key, value = expanded.unflatten(-1, (heads, -1)).tensor_split([still], -1)
        key = torch.cat([key, _turn_pairs(shared[:, None], rotation).expand(-1, heads, -1)], -1)
        query = torch.cat([query[..., :still], _turn_pairs(query[..., still:], rotation)], -1)
        out = _softmax_attention(query, key, value, _latent_scale(config, query.shape[-1]))
        return linear(out.flatten(1), f"{prefix}.o_proj")

    def attention(x_LH: torch.Tensor, prefix: str) -> torch.Tensor:
        if config.get("kv_lora_rank"):
            return latent_attention(x_LH, prefix)
        fused = ["query_key_value"] if is_bailing else [f"{part}_proj" for part in "qkv"]
        qkv = torch.cat([linear(x_LH, f"{prefix}.{name}") for name in fused], dim=-1)
        norms = [partial(rms_norm, name=name) for name in (f"{prefix}.q_norm.weight", f"{prefix}.k_norm.weight")
                 if name in weights] or [partial(rms_norm, name=name) for name in (
                     f"{prefix}.query_layernorm.weight", f"{prefix}.key_layernorm.weight") if name in weights]
        return linear(_attention(qkv, config, rotation, norms), f"{prefix}.{'dense' if is_bailing else 'o_proj'}")

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weight(f"{name}.weight"), weight(f"{name}.bias") if f"{name}.bias" in weights else None)

    is_bailing = config["model_type"] in ("bailing_moe", "bailing_moe_v2")
    num_experts = next((config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts")
                        if key in config), 0)  # transformers 5 writes the second
    embedding = f"model.{'word_embeddings' if is_bailing else 'embed_tokens'}.weight"
    x_LH = weight(embedding)[torch.as_tensor(list(token_ids))]
    rotation = _rope_tables(config, len(x_LH), dtype)
    routes = []

    def block(x_LH: torch.Tensor, layer: int) -> torch.Tensor:
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x_LH, f"{prefix}.input_layernorm.weight")
        x_LH = x_LH + attention(normed, f"{prefix}.{'attention' if is_bailing else 'self_attn'}")
        normed = rms_norm(x_LH, f"{prefix}.post_attention_layernorm.weight")
        if f"{prefix}.mlp.up_proj.weight" in weights:
            return x_LH + mlp(normed, f"{prefix}.mlp")
        out_LH, experts_Lk = moe(normed, f"{prefix}.mlp")
        routes.append(experts_Lk)
        return x_LH + out_LH

    embedded_LH = x_LH
    for layer in range(config["num_hidden_layers"]):
        x_LH = block(x_LH, layer)
    head = weight(embedding if config["tie_word_embeddings"] else "lm_head.weight")
    if config.get("norm_head"):
        head = head / (head.norm(dim=0, keepdim=True).detach() + NORM_HEAD_EPS)
    states_LH = rms_norm(x_LH, "model.norm.weight")
    if mtp:
        prefix = f"model.layers.{config['num_hidden_layers']}"
        rotation = tuple(table[:-1] for table in rotation)
        mixed = torch.cat([rms_norm(embedded_LH[1:], f"{prefix}.enorm.weight"),
                           rms_norm(states_LH[:-1], f"{prefix}.hnorm.weight")], -1)
        out_LH = block(F.linear(mixed, weight(f"{prefix}.eh_proj.weight")), config["num_hidden_layers"])
        states_LH = rms_norm(out_LH, f"{prefix}.{'final_layernorm' if is_bailing else 'shared_head.norm'}.weight")
    return F.linear(states_LH, head), routes


def response_logprobs(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], prompt: Sequence[int], response: Sequence[int], *,
    temperature: float = 1.0, dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Log-probability of each response token given what precedes it, [R]."""
    sequence = [*prompt, *response]
    with torch.no_grad():
        logprobs = torch.log_softmax(bailing_logits(weights, config, sequence, dtype=dtype) / temperature, dim=-1)
    rows = torch.arange(len(prompt) - 1, len(sequence) - 1)
    return logprobs[rows, torch.as_tensor(list(response), dtype=torch.int64)]


def _rope_tables(config: Mapping[str, Any], length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config["rope_theta"]
    part = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    dim = config.get("qk_rope_head_dim") or int(_head_dim(config) * part)
    inverse, factor = _frequencies(rope, theta, dim, dtype)
    angles = torch.outer(torch.arange(length, dtype=dtype), inverse)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos() * factor, angles.sin() * factor


def _frequencies(rope: Mapping[str, Any], theta: float, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """(angles per position [dim/2], what cosines and sines are multiplied by), pair by pair."""
    kind, original = rope.get("rope_type", rope.get("type", "default")), rope.get("original_max_position_embeddings")
    found = []
    for pair in range(dim // 2):
        plain = theta ** (-2 * pair / dim)
        turns = (original or 1) * plain / (2 * math.pi)
        if kind == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            kept = min(max((turns - low) / (high - low), 0), 1)
        elif kind == "yarn":
            first, last = (dim * math.log(original / (2 * math.pi * rope.get(key, default))) / (2 * math.log(theta))
                           for key, default in (("beta_fast", 32), ("beta_slow", 1)))
            if rope.get("truncate", True):
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dim - 1)
            kept = 1 - min(max((pair - first) / (last - first or 1e-3), 0), 1)
        else:
            kept = {"default": 1, "linear": 0}[kind]
        found.append(plain * kept + plain / rope.get("factor", 1.0) * (1 - kept))
    scale = 1.0
    if kind == "yarn":
        tops = (rope.get("mscale"), rope.get("mscale_all_dim"))
        scale = _mscale(rope, tops[0]) / _mscale(rope, tops[1]) if all(tops) else _mscale(rope, 1.0)
    return torch.tensor(found, dtype=dtype), scale


def _mscale(rope: Mapping[str, Any], mscale: float) -> float:
    return 1 + 0.1 * mscale * math.log(rope["factor"])


def _attention(
    qkv: torch.Tensor, config: Mapping[str, Any], rotation: tuple[torch.Tensor, torch.Tensor],
    norms: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    """Causal attention on rows laid out [all Q heads][all K heads][all V heads]; norms: of q and k, or none."""
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], _head_dim(config)
    length = len(qkv)
    q, k, v = qkv.view(length, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if norms:
        q, k = norms[0](q), norms[1](k)
    cos, sin = rotation

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turning, rest = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
        first, second = turning.chunk(2, dim=-1)
        return torch.cat([turning * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)

    q, k = rotate(q), rotate(k)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    return _softmax_attention(q, k, v, head_dim**-0.5).reshape(length, heads * head_dim)


def _softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    weights = torch.softmax(scores.masked_fill(~causal, float("-inf")), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def _turn_pairs(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Dimensions 2i and 2i + 1 turn together, as in DeepSeek's checkpoints."""
    cos, sin = (table[..., :table.shape[-1] // 2] for table in rotation)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def _latent_scale(config: Mapping[str, Any], width: int) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    yarn = rope.get("rope_type", rope.get("type")) == "yarn"
    return width**-0.5 * (_mscale(rope, rope.get("mscale_all_dim") or 0) ** 2 if yarn else 1)


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
