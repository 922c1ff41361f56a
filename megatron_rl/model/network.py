"""Network: a decoder-only checkpoint in the same words whatever its model_type calls them; no megatron here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.model.rope import RopeScaling
from megatron_rl.observe.flops import is_dense, shared_width


@dataclass(frozen=True)
class Network:
    """A pre-norm decoder with RMSNorm, rotary attention (grouped-query or latent), SiLU-gated dense or expert MLPs.

    model_type: the family (families/) that names its keys and tensors.

    Rotation:
    - rope_theta: its base. rope: how it is stretched (rope.py).
    - rotary_dim: so many leading dimensions of a head rotate. 0: all.

    Attention and head:
    - qk_norm: RMSNorm of each query and key head before the rotation.
    - kv_lora_rank above 0: latent attention (latent_attention.py), keys and values come from so many numbers of a
      token. q_lora_rank above 0: queries too. A head of a query or key has qk_nope_head_dim numbers that stay and
      qk_rope_head_dim that rotate, head_dim in all, and a head of a value has v_head_dim.
    - norm_head: the head's columns are divided by their norm over the vocabulary.

    Feed-forward:
    - num_experts 0: every layer is dense. intermediate_size: width of a dense layer's MLP.
    - first_k_dense_replace: that many leading layers are dense.
    - moe_intermediate_size: width of an expert. shared_expert_intermediate_size: of a shared one; 0: the same.
    - shared_expert_gate: the shared experts' output is multiplied by the sigmoid of a product with the input.

    Router:
    - score_function: softmax or sigmoid of the logits. norm_topk_prob: the chosen scores are divided by their sum.
    - expert_bias: a float32 bias per expert is added to the scores that choose, not to those that weigh.
    - n_group, topk_group: only the experts of the topk_group best of n_group groups can be chosen. 0: no groups.
      A group is as good as its best expert (softmax), or as its two best together (sigmoid).
    - topk_method: how config.json calls the choice, if it does.
    - routed_scaling_factor: the weights of the chosen are multiplied by it.
    - router_dtype: "fp32" if the engine keeps the router's weights in float32.

    num_nextn_predict_layers: layers behind the last, for multi-token prediction. They are not built; an export gets
    them from the source as they are.
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
    rope: RopeScaling = RopeScaling()
    rotary_dim: int = 0
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    score_function: str = "softmax"
    expert_bias: bool = False
    n_group: int = 0
    topk_group: int = 0
    routed_scaling_factor: float = 1.0
    router_dtype: str = ""
    num_nextn_predict_layers: int = 0
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    topk_method: str = ""

    @property
    def value_dim(self) -> int:
        """Width of a head of a value."""
        return self.v_head_dim or self.head_dim

    @property
    def softmax_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return (self.rope.softmax_factor if self.kv_lora_rank else 1.0) / math.sqrt(self.head_dim)

    @property
    def experts_ranking_a_group(self) -> int:
        return 1 if self.score_function == "softmax" else 2

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one MLP that holds all shared experts."""
        return shared_width(vars(self))

    @property
    def hidden_per_head(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def is_dense_layer(self, layer: int) -> bool:
        return is_dense(vars(self), layer)

    @property
    def num_moe_layers(self) -> int:
        return sum(not self.is_dense_layer(layer) for layer in range(self.num_hidden_layers))

    @property
    def limits_groups(self) -> bool:
        """Whether some experts cannot be chosen because of their group."""
        return self.topk_group < self.n_group


_MAY_BE_ZERO = {"intermediate_size", "num_experts", "num_experts_per_tok", "num_shared_experts",
                "moe_intermediate_size", "first_k_dense_replace", "initializer_range", "rotary_dim",
                "shared_expert_intermediate_size", "n_group", "topk_group", "num_nextn_predict_layers",
                "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
SCORES = ("softmax", "sigmoid")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
FREE_KEYS = frozenset({"initializer_range", "max_position_embeddings"})
"""What a config.json may change without becoming another network."""


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
        *_rotation_rules(network), *_latent_rules(network), *_router_rules(network),
        (not (network.norm_head and network.tie_word_embeddings),
         "tie_word_embeddings=true with norm_head=true is not supported: the engine would use the embedding as it is"),
    )
    for holds, message in rules:
        if not holds:
            raise ValueError(f"{where}: {message}")


def _rotation_rules(network: Network) -> Iterator[tuple[bool, str]]:
    dim = network.rotary_dim
    yield dim % 2 == 0 and dim <= network.head_dim, (
        f"rotary_dim={dim} must be even and at most head_dim={network.head_dim}")


def _latent_rules(network: Network) -> Iterator[tuple[bool, str]]:
    if not network.kv_lora_rank:
        return
    rope, heads = network.rope, network.num_attention_heads
    for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        yield getattr(network, key) > 0, f"{key}=0: latent attention has such dimensions"
    yield network.num_key_value_heads == heads, (
        f"num_key_value_heads={network.num_key_value_heads} is not supported: each of num_attention_heads={heads} has "
        "a key and a value of its own")
    yield network.v_head_dim <= network.head_dim, (
        f"v_head_dim={network.v_head_dim} is not supported above qk_nope_head_dim+qk_rope_head_dim={network.head_dim}")
    yield rope.kind in ("default", "yarn"), (
        f"rope_scaling of type {rope.kind} is not supported: the engine takes every scaling of this class for yarn")
    yield rope.truncate, "rope_scaling.truncate=false is not supported: the engine does not read it in this class"
    yield bool(rope.mscale) if rope.mscale_all_dim else rope.mscale in (None, 1.0), (  # 1.0 is the engine's default
        f"rope_scaling.mscale={rope.mscale} with mscale_all_dim={rope.mscale_all_dim} is not supported: transformers "
        "takes none or both of them, the engine takes each; give both above 0, or none")


def _router_rules(network: Network) -> Iterator[tuple[bool, str]]:
    score, bias, top = network.score_function, network.expert_bias, network.num_experts_per_tok
    groups, chosen = network.n_group, network.topk_group
    yield score in SCORES, f"score_function={score} is not supported; only {', '.join(SCORES)} are"
    yield network.router_dtype in ("", "fp32"), f"router_dtype={network.router_dtype} is not supported; only fp32 is"
    yield bias == (score == "sigmoid"), (
        f"score_function={score} with moe_router_enable_expert_bias={json.dumps(bias)} is not supported: the engine "
        "takes softmax without a bias, or sigmoid with one")
    yield score == "softmax" or network.norm_topk_prob, (
        "norm_topk_prob=false with score_function=sigmoid is not supported: the published model divides in any case")
    yield (chosen > 0) == (groups > 0) and chosen <= groups, (
        f"topk_group={chosen} must be in 1..n_group={groups}, or both be 0")
    method, limits = network.topk_method, network.limits_groups
    yield method in ("", *TOPK_METHODS), f"topk_method={method} is not supported; only {', '.join(TOPK_METHODS)} are"
    yield not method or bias == (method == "noaux_tc"), (
        f"topk_method={method} with score_function={score} is not supported: sigmoid goes with noaux_tc, softmax "
        "with the others")
    yield not (method == "greedy" and limits), (
        f"topk_method=greedy with topk_group={chosen} of n_group={groups} is not supported: the engine would limit the "
        "choice to groups, transformers would not")
    if limits:
        yield network.num_experts % groups == 0, f"n_group={groups} does not divide num_experts={network.num_experts}"
        yield network.experts_ranking_a_group * groups <= network.num_experts, (
            f"n_group={groups} leaves fewer than two of num_experts={network.num_experts} to a group")
        yield top <= chosen * network.num_experts // groups, (
            f"num_experts_per_tok={top} are more experts than topk_group={chosen} of n_group={groups} groups hold")


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
        ("tp", parallel.tp, "the shared experts' width", network.shared_intermediate_size),
        ("etp", parallel.etp, "moe_intermediate_size", network.moe_intermediate_size),
        ("ep", parallel.ep, "num_experts", network.num_experts),
        ("pp", parallel.pp * (parallel.vpp or 1), "num_hidden_layers", network.num_hidden_layers),
    )
    for key, size, name, total in rules:
        if total % size:
            shown = f"pp*vpp={size}" if key == "pp" and parallel.vpp else f"{key}={size}"
            fitting = ", ".join(str(value) for value in range(1, min(total, 4 * size) + 1) if total % value == 0)
            raise ValueError(f"parallel.{shown} does not divide {name}={total}; {fitting} would")
