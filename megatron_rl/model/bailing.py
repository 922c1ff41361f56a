"""config.json of a `bailing_moe` checkpoint: its sizes, its tensor names, its parameter counts; no megatron here.

Every size comes from the checkpoint; none is hard-coded (spec: Ling-lite's published configuration).
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import ParallelConfig


@dataclass(frozen=True)
class BailingConfig:
    """The keys of config.json that shape the network (BailingMoeForCausalLM)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    head_dim: int
    first_k_dense_replace: int = 0
    norm_head: bool = False
    tie_word_embeddings: bool = False
    use_bias: bool = False
    use_qkv_bias: bool = False
    initializer_range: float = 0.006
    eos_token_id: int = 0
    pad_token_id: int = 0

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one MLP that holds all shared experts."""
        return self.moe_intermediate_size * self.num_shared_experts

    def is_dense_layer(self, layer: int) -> bool:
        return layer < self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace


def read_config(folder: str | Path) -> BailingConfig:
    """BailingConfig of the Hugging Face folder. ValueError names the file and the key that does not fit."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.path={folder}: no config.json there; give a Hugging Face folder of a bailing_moe "
                         "model")
    return parse_config(json.loads(path.read_text()), str(path))


def parse_config(raw: dict[str, Any], where: str) -> BailingConfig:
    """BailingConfig from the parsed config.json `raw`; `where` is named in errors."""
    if raw.get("model_type") != "bailing_moe":
        raise ValueError(f"{where}: model_type={raw.get('model_type')!r}; only 'bailing_moe' is supported "
                         "(`megatron-rl convert upcycle` turns a dense Llama checkpoint into one)")
    known = {field.name for field in fields(BailingConfig)}
    required = {field.name for field in fields(BailingConfig) if _has_no_default(field)} - {"head_dim"}
    missing = sorted(required - set(raw))
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    raw = dict(raw)
    raw.setdefault("head_dim", None)
    if raw["head_dim"] is None:
        raw["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    if raw.get("rope_scaling") is not None:
        raise ValueError(f"{where}: rope_scaling={raw['rope_scaling']} is not supported; only null is")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act={raw['hidden_act']!r} is not supported; only 'silu' is")
    config = BailingConfig(**{key: value for key, value in raw.items() if key in known and value is not None})
    for flag in ("use_bias", "use_qkv_bias", "tie_word_embeddings"):
        if getattr(config, flag):
            raise ValueError(f"{where}: {flag}=true is not supported")
    return config


def _has_no_default(field) -> bool:
    return field.default is MISSING


def check_layout(model: BailingConfig, parallel: ParallelConfig) -> None:
    """Raise ValueError, naming the key, when a parallel size does not divide what it splits."""
    rules = (
        ("tp", parallel.tp, "num_attention_heads", model.num_attention_heads),
        ("tp", parallel.tp, "num_key_value_heads", model.num_key_value_heads),
        ("tp", parallel.tp, "vocab_size", model.vocab_size),
        ("tp", parallel.tp, "intermediate_size", model.intermediate_size if model.first_k_dense_replace else 0),
        ("tp", parallel.tp, "num_shared_experts*moe_intermediate_size", model.shared_intermediate_size),
        ("etp", parallel.etp, "moe_intermediate_size", model.moe_intermediate_size),
        ("ep", parallel.ep, "num_experts", model.num_experts),
        ("pp", parallel.pp * (parallel.vpp or 1), "num_hidden_layers", model.num_hidden_layers),
    )
    for key, size, name, total in rules:
        if total % size:
            shown = f"pp*vpp={size}" if key == "pp" and parallel.vpp else f"{key}={size}"
            raise ValueError(f"parallel.{shown} does not divide {name}={total}")


def expected_shapes(config: BailingConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor name of a bailing_moe checkpoint with its shape (spec: checkpoint names)."""
    hidden, dim = config.hidden_size, config.head_dim
    shapes = {"model.word_embeddings.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,),
              "lm_head.weight": (config.vocab_size, hidden)}

    def mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, width)

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * dim
        shapes[prefix + "attention.query_key_value.weight"] = (rows, hidden)
        shapes[prefix + "attention.dense.weight"] = (hidden, config.num_attention_heads * dim)
        if config.is_dense_layer(layer):
            mlp(prefix + "mlp", config.intermediate_size)
            continue
        shapes[prefix + "mlp.gate.weight"] = (config.num_experts, hidden)
        for expert in range(config.num_experts):
            mlp(f"{prefix}mlp.experts.{expert}", config.moe_intermediate_size)
        if config.num_shared_experts:
            mlp(prefix + "mlp.shared_experts", config.shared_intermediate_size)
    return shapes


def count_parameters(config: BailingConfig) -> tuple[int, int]:
    """(total, active) parameters of the network.

    total: every tensor of the checkpoint. active: those that one token passes through, that is total less,
    in each MoE layer, the routed experts that are not chosen; the embedding table and the head count whole,
    which is how Ling-lite comes to 2.75B (2.49B without its embedding table).
    """
    total = sum(prod(shape) for shape in expected_shapes(config).values())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle_experts = config.num_moe_layers * (config.num_experts - config.num_experts_per_tok)
    return total, total - idle_experts * expert
