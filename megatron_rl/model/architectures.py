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
from megatron_rl.model.network import Network, check_network, check_types

HF_FILES = Path(__file__).parent / "hf_files"
_ROPE_KEYS = ("rope_parameters", "rope_scaling")  # transformers 5 writes the first, older versions the second
_ROPE_PARTS = {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}
_EMPTY = (None, False, 0, "", [], {})
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
    only: config.json key -> the one value that is supported; silent or null also passes. not_null: those of them that
        may be left out and not be null, which breaks the engine. same: key -> the key whose value it must repeat.
    ignored: keys that SGLang or transformers reads and that change nothing here (COMMON holds more).
    Every key that either program reads for the family stands in one of these, in rope's parts, or in OTHER_NETWORKS,
    whose keys must be empty: tests/megatron_rl/model/test_config_keys.py compares with their sources.
    files: copied beside an export from hf_files/; auto_map: config.json's entry that names them.
    """

    class_name: str
    names: Mapping[str, tuple[str, ...]]
    layer_prefix: str = "model.layers.{layer}."
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    not_null: frozenset[str] = frozenset()
    same: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    files: tuple[str, ...] = ()
    auto_map: Mapping[str, str] = field(default_factory=dict)


COMMON = frozenset({
    "architectures", "model_type", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
    "attention_dropout", "embedding_dropout", "output_dropout", "initializer_range", "context_len",
})
"""Keys that are read for every family and change nothing: no training here drops anything, and SGLang sets context_len
itself."""
OTHER_NETWORKS = frozenset({
    "add_full_attention_sink_bias", "add_swa_attention_sink_bias", "attention_chunk_size", "attention_other_setting",
    "attention_projection_layout", "attn_config", "audio_config", "block_configs", "cli_factor", "compress_ratios",
    "compression_config", "decoder_layers", "dual_chunk_attention_config", "enable_lm_head_fp32",
    "enable_lm_head_output_fp32", "encoder_layers", "encoder_only", "engram_layer_ids", "final_logit_softcapping",
    "full_attention_interval", "hc_mult", "hybrid_layer_pattern", "image_token_id", "image_token_index",
    "index_head_dim", "index_kpool", "index_kpool_compress", "index_n_heads", "index_skip_topk_offset", "index_topk",
    "index_topk_freq", "index_topk_pattern", "indexer_types", "is_hybrid_swa", "is_matryoshka", "kv_lora_rank",
    "language_model_only", "language_only", "learnable_sink", "linear_attn_config", "linear_head_dim",
    "linear_num_heads", "local_layer_ids", "loop_num", "matryoshka_dimensions", "mhc", "mlp_layer_types",
    "mtp_layer_types", "mtp_local_extent", "mtp_local_layer_ids", "mtp_mlp_layer_types", "mtp_num_experts",
    "mtp_num_experts_per_tok", "mtp_per_layer_config", "multi_query", "n_group", "new_decoder_architecture",
    "ngram_embedding_n", "num_attention_heads_per_layer", "num_indexer_layers", "num_kv_shared_layers", "num_loops",
    "num_mtp_layers", "num_nextn_predict_layers", "original_num_attention_heads", "per_layer_config",
    "qk_nope_head_dim", "qk_rope_head_dim", "quantization_config", "sliding_window", "sliding_window_size",
    "sound_config", "sparse_attention_config", "swa_head_dim", "swa_kv_lora_rank", "swa_num_key_value_heads",
    "swa_qk_rope_head_dim", "swa_v_head_dim", "text_config", "thinker_config", "topk_group",
    "use_bidirectional_attention", "use_mla", "use_mla_nope", "use_ngram_embedding", "v_head_dim", "vision_config",
    "vision_n_layers", "vision_vocab_size", "window_size",
})
"""Keys by which SGLang's ModelConfig and transformers' base class turn any family into another network: they are
refused unless empty, but for a family that gives one a meaning of its own."""
_ONLY = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "is_causal": True}
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
    fixed={"qk_norm": False},
    defaults={"initializer_range": 0.006},
    only={**_ONLY, "use_bias": False, "use_qk_norm": False, "moe_router_enable_expert_bias": False,
          "score_function": "softmax", "routed_scaling_factor": 1.0, "n_group": 0, "topk_group": 0, "multi_gate": False,
          "router_type": "topN", "router_dtype": None, "use_sliding_window": False},
    not_null=frozenset({"partial_rotary_factor", "n_group", "topk_group", "routed_scaling_factor",
                        "moe_shared_expert_intermediate_size", "rotary_dim"}),
    same={"moe_shared_expert_intermediate_size": "moe_intermediate_size", "rotary_dim": "head_dim"},
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
               "norm_topk_prob": True, "first_k_dense_replace": 0, "norm_head": False, "qk_norm": False,
               "qkv_bias": False}
_QWEN_ONLY = {**_ONLY, "attention_bias": False, "use_sliding_window": False, "scale_emb": 1}
_WINDOW = frozenset({"sliding_window", "max_window_layers"})  # nothing without use_sliding_window
_UNUSED = frozenset({"num_experts", "num_experts_per_tok", "first_k_dense_replace"})  # in a network without experts

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({
    "bailing_moe": _BAILING_MOE,
    "llama": Architecture(
        class_name="LlamaForCausalLM", names={**_NORMS_AND_HEAD, **_SELF_ATTENTION, **_MLP},
        fixed=_NO_EXPERTS, defaults={"rope_theta": 10000.0},
        only={**_ONLY, "attention_bias": False, "bias": False, "mlp_bias": False, "rope_is_neox_style": True,
              "target_hidden_size": None, "original_max_position_embeddings": None},
        ignored=_UNUSED | {"pretraining_tp"}),
    "qwen2": Architecture(
        class_name="Qwen2ForCausalLM", names={**_NORMS_AND_HEAD, **_SELF_ATTENTION, **_MLP},
        fixed={**_NO_EXPERTS, "qkv_bias": True}, defaults={"rope_theta": 10000.0}, only=_QWEN_ONLY,
        ignored=_WINDOW | _UNUSED),
    "qwen3": Architecture(
        class_name="Qwen3ForCausalLM", names={**_NORMS_AND_HEAD, **_SELF_ATTENTION, **_QUERY_KEY_NORMS, **_MLP},
        fixed={**_NO_EXPERTS, "qk_norm": True}, defaults={"rope_theta": 10000.0, "head_dim": 128}, only=_QWEN_ONLY,
        ignored=_WINDOW | _UNUSED),
    "qwen3_moe": Architecture(
        class_name="Qwen3MoeForCausalLM",
        names={**_NORMS_AND_HEAD, **_SELF_ATTENTION, **_QUERY_KEY_NORMS, **_EXPERTS},
        keys={"num_experts": ("num_experts", "num_local_experts")},
        fixed={"num_shared_experts": 0, "qk_norm": True, "qkv_bias": False, "norm_head": False,
               "first_k_dense_replace": 0, "tie_word_embeddings": False},
        defaults={"rope_theta": 10000.0},
        only={**_QWEN_ONLY, "decoder_sparse_step": 1, "mlp_only_layers": [], "first_k_dense_replace": 0,
              "tie_word_embeddings": False,  # SGLang's class has a head of its own in any case
              "qkv_bias": None, "n_shared_experts": None, "shared_expert_intermediate_size": None},
        ignored=_WINDOW | {"output_router_logits", "router_aux_loss_coef"}),
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
    _check_keys(architecture, raw, where)
    rope = _rope(raw, where)
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
    check_types(found, where)
    if "head_dim" not in found:
        heads, hidden = found["num_attention_heads"], found["hidden_size"]
        if heads < 1 or hidden % heads:
            raise ValueError(f"{where}: num_attention_heads={heads} does not divide hidden_size={hidden}")
        found["head_dim"] = hidden // heads
    network = Network(**found)
    if network.num_experts == 0 and "num_experts" not in architecture.fixed:
        raise ValueError(f"{where}: num_experts=0: a {network.model_type} has experts")
    check_network(network, where)
    for key, other in architecture.same.items():
        if key in raw and raw[key] != getattr(network, other):
            raise ValueError(f"{where}: {key}={json.dumps(raw[key])} is not supported; only {other}="
                             f"{getattr(network, other)} is")
    return network


def _check_keys(architecture: Architecture, raw: Mapping[str, Any], where: str) -> None:
    """ValueError naming the first key by which engine or transformers would build another network than the trainer."""
    for key in sorted(architecture.not_null & raw.keys()):
        if raw[key] is None:
            raise ValueError(f"{where}: {key}=null breaks the engine: leave the key out")
    for key, value in architecture.only.items():
        _require_only(where, key, raw.get(key), value)
    for key in sorted((OTHER_NETWORKS - architecture.only.keys() - architecture.ignored) & raw.keys()):
        if raw[key] not in _EMPTY:
            raise ValueError(f"{where}: {key}={json.dumps(raw[key])} is not supported: it makes another network than "
                             f"{raw['model_type']}")
    sliding = {kind for kind in raw.get("layer_types") or () if kind != "full_attention"}
    if sliding:
        raise ValueError(f"{where}: layer_types with {', '.join(sorted(map(str, sliding)))} is not supported; only "
                         "full_attention is")


def _require_only(where: str, key: str, found: Any, accepted: Any) -> None:
    if found is not None and (found != accepted or isinstance(found, bool) != isinstance(accepted, bool)):
        raise ValueError(f"{where}: {key}={json.dumps(found)} is not supported; only {json.dumps(accepted)} is")


def _rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Everything that config.json says of the rotation, its kind as rope_type ("default" without scaling)."""
    given = [raw[name] for name in _ROPE_KEYS if raw.get(name)]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(f"{where}: rope_parameters={given[0]} and rope_scaling={given[1]} say different things, and "
                         "transformers takes one of them: keep the one that is meant")
    found = given[0] if given else {}
    if not isinstance(found, dict):
        raise ValueError(f"{where}: rope_parameters={json.dumps(found)} must be a mapping")
    for key in found.keys() - _ROPE_PARTS:
        if found[key] is not None and not (key == "original_max_position_embeddings" and type(found[key]) is int):
            raise ValueError(f"{where}: {key}={json.dumps(found[key])} in the rotation's parameters is not supported; "
                             f"only {', '.join(sorted(_ROPE_PARTS))} are")
    return {"rope_type": found.get("type", "default")} | found


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
