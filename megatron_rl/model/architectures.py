"""Each supported model_type as one table: its config.json keys, its tensor names, the files of its folder.

A new model that Network can describe is a new entry here and nothing else (docs/models.md). No megatron here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_rl.config.load import read_json
from megatron_rl.model.network import Network

HF_FILES = Path(__file__).parent / "hf_files"
_ROPE_KEYS = ("rope_parameters", "rope_scaling")  # transformers 5 writes the first, older versions the second
_DERIVED = {"model_type", "rope_factor"}


@dataclass(frozen=True)
class Architecture:
    """One model_type.

    class_name: config.json's `architectures`, which the engine looks up.
    names: Megatron parameter -> Hugging Face tensor names, as slots.py composes them. Layer parameters are relative
        to `decoder.layers.N.` and `layer_prefix`, and may hold {expert}. One name where slots.py has several parts
        (query, key, value; gate, up): they lie one after another in that tensor.
    keys: Network field -> config.json keys that may hold it, the first found counts; without entry the field's name.
    fixed: Network fields that are the same in every checkpoint. defaults: where config.json is silent or null.
    only: config.json key -> the one value that is supported; silent or null also passes.
    files: copied beside an export from hf_files/; auto_map: config.json's entry that names them.
    """

    class_name: str
    names: Mapping[str, tuple[str, ...]]
    layer_prefix: str = "model.layers.{layer}."
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    auto_map: Mapping[str, str] = field(default_factory=dict)


_NORMS_AND_HEAD = {
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
}
_MLP = {
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_EXPERTS = {
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.experts.local_experts.{expert}.linear_fc1.weight": (
        "mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp.experts.local_experts.{expert}.linear_fc2.weight": ("mlp.experts.{expert}.down_proj.weight",),
}
_BAILING_MOE = Architecture(
    class_name="BailingMoeForCausalLM",
    names={
        **_NORMS_AND_HEAD, **_MLP, **_EXPERTS,
        "embedding.word_embeddings.weight": ("model.word_embeddings.weight",),
        "self_attention.linear_qkv.weight": ("attention.query_key_value.weight",),
        "self_attention.linear_qkv.bias": ("attention.query_key_value.bias",),
        "self_attention.linear_proj.weight": ("attention.dense.weight",),
        "mlp.shared_experts.linear_fc1.weight": (
            "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        "mlp.shared_experts.linear_fc2.weight": ("mlp.shared_experts.down_proj.weight",),
    },
    keys={"qkv_bias": ("use_qkv_bias",)},
    defaults={"initializer_range": 0.006},
    only={"hidden_act": "silu", "use_bias": False, "use_qk_norm": False, "partial_rotary_factor": 1.0,
          "moe_router_enable_expert_bias": False, "score_function": "softmax", "routed_scaling_factor": 1.0,
          "n_group": 0, "multi_gate": False, "use_sliding_window": False},
    files=("configuration_bailing_moe.py",),
    auto_map={"AutoConfig": "configuration_bailing_moe.BailingMoeConfig"},
)
_SELF_ATTENTION = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    **{f"self_attention.linear_qkv.{kind}": tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv")
       for kind in ("weight", "bias")},
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
_QUERY_KEY_NORMS = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
}
_NO_EXPERTS = {"num_experts": 0, "num_experts_per_tok": 0, "num_shared_experts": 0, "moe_intermediate_size": 0,
               "norm_topk_prob": True}
_QWEN_ONLY = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({
    "bailing_moe": _BAILING_MOE,
    "llama": Architecture(
        class_name="LlamaForCausalLM", names={**_NORMS_AND_HEAD, **_SELF_ATTENTION, **_MLP},
        fixed=_NO_EXPERTS, defaults={"rope_theta": 10000.0},
        only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}),
    "qwen2": Architecture(
        class_name="Qwen2ForCausalLM", names={**_NORMS_AND_HEAD, **_SELF_ATTENTION, **_MLP},
        fixed={**_NO_EXPERTS, "qkv_bias": True}, defaults={"rope_theta": 10000.0}, only=_QWEN_ONLY),
    "qwen3": Architecture(
        class_name="Qwen3ForCausalLM", names={**_NORMS_AND_HEAD, **_SELF_ATTENTION, **_QUERY_KEY_NORMS, **_MLP},
        fixed={**_NO_EXPERTS, "qk_norm": True}, defaults={"rope_theta": 10000.0, "head_dim": 128}, only=_QWEN_ONLY),
    "qwen3_moe": Architecture(
        class_name="Qwen3MoeForCausalLM",
        names={**_NORMS_AND_HEAD, **_SELF_ATTENTION, **_QUERY_KEY_NORMS, **_EXPERTS},
        keys={"num_experts": ("num_experts", "num_local_experts")},
        fixed={"num_shared_experts": 0, "qk_norm": True}, defaults={"rope_theta": 10000.0},
        only={**_QWEN_ONLY, "decoder_sparse_step": 1, "mlp_only_layers": []}),
})


def read_config(folder: str | Path) -> Network:
    """The network of a Hugging Face folder. ValueError names the file and the key that does not fit."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.path={folder}: no config.json there; give a Hugging Face folder of a "
                         f"{', '.join(ARCHITECTURES)} model")
    raw = read_json(path)
    if (Path(folder) / "hf" / "config.json").is_file() and "model_type" not in raw:
        raise ValueError(f"model.path={folder} is a run's folder; the model that it wrote is {folder}/hf")
    return parse_config(raw, str(path))


def architecture_of(raw: Mapping[str, Any], where: str) -> Architecture:
    """The table of config.json's model_type."""
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{where}: model_type={model_type!r} is not supported; only {', '.join(ARCHITECTURES)} are "
                         "(docs/models.md says how to add one)")
    return ARCHITECTURES[model_type]


def parse_config(raw: Mapping[str, Any], where: str) -> Network:
    """The network of the parsed config.json `raw`; `where` is named in errors."""
    architecture = architecture_of(raw, where)
    for key, value in architecture.only.items():
        _require_only(where, key, raw.get(key), value)
    rope = _rope(raw)
    values = {**raw, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}
    found = {"model_type": raw["model_type"], "rope_factor": _rope_factor(rope, where)}
    missing = []
    for item in fields(Network):
        if item.name in _DERIVED:
            continue
        keys = architecture.keys.get(item.name, (item.name,))
        present = [values[key] for key in keys if values.get(key) is not None]
        if item.name in architecture.fixed:
            found[item.name] = architecture.fixed[item.name]
        elif present:
            found[item.name] = present[0]
        elif item.name in architecture.defaults:
            found[item.name] = architecture.defaults[item.name]
        elif item.default is MISSING and item.name != "head_dim":
            missing.append(keys[0])
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
    network = Network(**found)
    if network.norm_head and network.tie_word_embeddings:
        raise ValueError(f"{where}: tie_word_embeddings=true with norm_head=true is not supported: the engine would "
                         "use the embedding as it is")
    return network


def _require_only(where: str, key: str, found: Any, accepted: Any) -> None:
    if found is not None and found != accepted:
        raise ValueError(f"{where}: {key}={json.dumps(found)} is not supported; only {json.dumps(accepted)} is")


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that config.json says of the rotation, its kind as rope_type ("default" without scaling)."""
    found = {"rope_type": "default"}
    for name in _ROPE_KEYS:
        given = raw.get(name) or {}
        found |= ({"rope_type": given["type"]} if "type" in given else {}) | given
    return found


def _rope_factor(rope: Mapping[str, Any], where: str) -> float:
    """What positions are divided by: 1 without scaling, the factor of linear scaling. ValueError for other kinds."""
    kind = rope["rope_type"]
    _require_only(where, "partial_rotary_factor", rope.get("partial_rotary_factor"), 1.0)
    if kind == "default":
        return 1.0
    if kind == "dynamic":
        raise ValueError(
            f"{where}: rope_scaling={rope} is not supported: transformers recomputes the base as a sequence "
            "grows, SGLang takes one base for all lengths, so engine and trainer would disagree. Up to "
            "max_position_embeddings the network is the one with rope_scaling null")
    if kind != "linear":
        raise ValueError(f"{where}: rope_scaling={rope} is not supported; only null and linear are")
    factor = rope.get("factor")
    if not isinstance(factor, float) or factor < 1.0:
        raise ValueError(f"{where}: rope_scaling.factor={factor!r} must be a float of at least 1.0 (the engine takes "
                         "no integer)")
    return factor
