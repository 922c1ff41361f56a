"""bailing_moe: Ling-lite and Ring-lite, with shared experts, dense first layers and a NormHead."""

from __future__ import annotations

import megatron_rl.model.families.base as base

FAMILY = base.Family(
    model_type="bailing_moe",
    class_name="BailingMoeForCausalLM",
    engine_modules=("bailing_moe",),
    names={
        **base.NORMS_AND_HEAD, **base.MLP, **base.EXPERTS, **base.SHARED_EXPERTS,
        "embedding.word_embeddings.weight": ("model.word_embeddings.weight",),
        "self_attention.linear_qkv.weight": ("attention.query_key_value.weight",),
        "self_attention.linear_qkv.bias": ("attention.query_key_value.bias",),
        "self_attention.linear_proj.weight": ("attention.dense.weight",),
    },
    keys={**base.KEYS, "qkv_bias": ("use_qkv_bias",), "norm_head": ("norm_head",),
          "first_k_dense_replace": ("first_k_dense_replace",)},
    defaults={"initializer_range": 0.006},
    only={**base.ONLY, "use_bias": False, "use_qk_norm": False, "moe_router_enable_expert_bias": False,
          "score_function": "softmax", "routed_scaling_factor": 1.0, "n_group": 0, "topk_group": 0, "multi_gate": False,
          "router_type": "topN", "router_dtype": None, "use_sliding_window": False},
    not_null=frozenset({"partial_rotary_factor", "n_group", "topk_group", "routed_scaling_factor",
                        "moe_shared_expert_intermediate_size", "rotary_dim"}),
    same={"moe_shared_expert_intermediate_size": "moe_intermediate_size", "rotary_dim": "head_dim"},
    files=("configuration_bailing_moe.py",),
    auto_map={"AutoConfig": "configuration_bailing_moe.BailingMoeConfig"},
    engine_layout=(*base.ENGINE_EXPERTS, *base.ENGINE_MLP),
    zero_width=("shared_experts.gate_up_proj.weight", "shared_experts.down_proj.weight"),
    tiny={**base.TINY, **base.TINY_EXPERTS, "num_shared_experts": 1, "rope_theta": 600000.0},
)
