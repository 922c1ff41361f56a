"""What one family of networks (a model_type of config.json) is, and the tables that several families share.

A family is a file beside this one: sizes, keys, tensor names, refusals, the engine's class and layout, what an export
needs, and a tiny network for tests. No megatron here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One model_type.

    class_name: config.json's `architectures`, which the engine looks up; engine_modules: where SGLang has that class
        and those that it builds on (sglang/srt/models).
    names: Megatron parameter -> Hugging Face tensor names, as slots.py composes them. Layer parameters are relative
        to `decoder.layers.N.` and `layer_prefix`, and may hold {expert}. Those that begin with `mtp.` are of the layer
        behind the last, which model.mtp trains. One name where slots.py has several parts
        (query, key, value; gate, up): they lie one after another in that tensor.
    aliases: other model_types under which checkpoints with this class_name are published.
    keys: Network field -> config.json keys that may hold it, the first found counts. Without entry a field that has a
        default in Network keeps it, and any other is read under its own name.
    fixed: Network fields that are the same in every checkpoint. defaults: where config.json is silent or null.
    present: keys that must be there, though they may be null: the engine reads them without a default, or transformers
        has a default of its own.
    required: fields with a default in Network that config.json must give all the same, because trainer, engine and the
        published code have different ones.
    only: config.json key -> the one value that is supported; silent or null also passes. not_null: those of them that
        may be left out and not be null, which breaks the engine. same: key -> the key whose value it must repeat.
    ignored: keys that SGLang or transformers reads and that change nothing here (COMMON holds more).
    engine_latent_layout: more of engine_layout for queries that come from a latent vector (q_lora_rank).
    engine_layout: how the engine's class joins tensors (sync/verify.py): checkpoint name -> engine parameter, (parts
        per expert, MLP or attention, which of them this is), the dimension that holds the MLP's width. Whatever
        matches no row keeps its name and is whole. zero_width: parameters beside the router of a layer without shared
        experts, which the class makes all the same.
    partial_rotation: whether partial_rotary_factor (or rotary_dim) of config.json counts. Otherwise it must be 1.
    files: copied beside an export from hf_files/; auto_map: config.json's entry that names them.
    tiny: config.json of a small network, for tests.
    Every key that SGLang or transformers reads for the family stands in one of these, in rope's parts, or in
    OTHER_NETWORKS, whose keys must be empty: tests/megatron_rl/model/test_config_keys.py compares with their sources.
    """

    model_type: str
    class_name: str
    engine_modules: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]]
    tiny: Mapping[str, Any]
    layer_prefix: str = "model.layers.{layer}."
    aliases: frozenset[str] = frozenset()
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    present: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    only: Mapping[str, Any] = field(default_factory=dict)
    not_null: frozenset[str] = frozenset()
    same: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    engine_layout: tuple[tuple[str, str, tuple[int, int], int | None], ...] = ()
    engine_latent_layout: tuple[tuple[str, str, tuple[int, int], int | None], ...] = ()
    zero_width: tuple[str, ...] = ()
    partial_rotation: bool = False
    files: tuple[str, ...] = ()
    auto_map: Mapping[str, str] = field(default_factory=dict)

    def keys_of(self, name: str, has_default: bool) -> tuple[str, ...]:
        """The keys of config.json that may hold Network's field `name`."""
        return self.keys.get(name, () if has_default else (name,))

    @property
    def is_latent(self) -> bool:
        """Whether its attention is latent (latent_attention.py)."""
        return "kv_lora_rank" in self.keys

    @property
    def meant(self) -> frozenset[str]:
        """Keys that `keys` gives a meaning."""
        rotation = {"partial_rotary_factor", "rotary_dim"} if self.partial_rotation else set()
        return frozenset({key for keys in self.keys.values() for key in keys} | rotation)


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
ONLY = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "is_causal": True}
NORMS_AND_HEAD = {
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
}
MLP = {
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
EXPERTS = {
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.experts.local_experts.{expert}.linear_fc1.weight": (
        "mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp.experts.local_experts.{expert}.linear_fc2.weight": ("mlp.experts.{expert}.down_proj.weight",),
}
SHARED_EXPERTS = {
    "mlp.shared_experts.linear_fc1.weight": (
        "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "mlp.shared_experts.linear_fc2.weight": ("mlp.shared_experts.down_proj.weight",),
}
SELF_ATTENTION = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    **{f"self_attention.linear_qkv.{kind}": tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv")
       for kind in ("weight", "bias")},
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
QUERY_KEY_NORMS = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
}
MTP = {f"mtp.{name}.weight": (f"{name}.weight",) for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")}
"""What the layer behind the last has beside the parts of any layer."""
KEYS = {name: (name,) for name in ("tie_word_embeddings", "initializer_range")}
NO_EXPERTS = {"num_experts": 0, "num_experts_per_tok": 0, "num_shared_experts": 0, "moe_intermediate_size": 0,
              "norm_topk_prob": True}
QWEN_ONLY = {**ONLY, "attention_bias": False, "use_sliding_window": False, "scale_emb": 1}
WINDOW = frozenset({"sliding_window", "max_window_layers"})  # nothing without use_sliding_window
UNUSED = frozenset({"num_experts", "num_experts_per_tok", "first_k_dense_replace"})  # in a network without experts
ENGINE_MLP = (
    (r"(?P<mlp>.*\.mlp(\.shared_experts?)?)\.gate_proj\.weight", "{mlp}.gate_up_proj.weight", (2, 0), 0),
    (r"(?P<mlp>.*\.mlp(\.shared_experts?)?)\.up_proj\.weight", "{mlp}.gate_up_proj.weight", (2, 1), 0),
    (r"(?P<mlp>.*\.mlp(\.shared_experts?)?)\.down_proj\.weight", "{mlp}.down_proj.weight", (1, 0), 1),
)
_EXPERT = r"(?P<mlp>.*\.mlp\.experts)\.(?P<expert>\d+)"
ENGINE_EXPERTS = (
    (_EXPERT + r"\.gate_proj\.weight", "{mlp}.w13_weight", (2, 0), 0),
    (_EXPERT + r"\.up_proj\.weight", "{mlp}.w13_weight", (2, 1), 0),
    (_EXPERT + r"\.down_proj\.weight", "{mlp}.w2_weight", (1, 0), 1),
)
ENGINE_ATTENTION = tuple(
    (rf"(?P<attention>.*\.self_attn)\.{part}_proj\.(?P<kind>weight|bias)", "{attention}.qkv_proj.{kind}",
     (3, place), None) for place, part in enumerate("qkv"))
TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "initializer_range": 0.1, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": 0,
}
TINY_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
