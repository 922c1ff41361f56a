"""glm4_moe: GLM-4.5, GLM-4.5-Air and kin, with sigmoid scores, an expert bias, shared experts and half rotation."""

from __future__ import annotations

import megatron_rl.model.families.base as base

FAMILY = base.Family(
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    engine_modules=("glm4_moe",),
    names={
        **base.NORMS_AND_HEAD, **base.SELF_ATTENTION, **base.QUERY_KEY_NORMS, **base.MLP, **base.EXPERTS,
        **base.SHARED_EXPERTS, **base.MTP, "mtp.final_layernorm.weight": ("shared_head.norm.weight",),
        "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias",),
    },
    keys={
        "initializer_range": ("initializer_range",),
        "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
        "num_shared_experts": ("n_shared_experts",), "qkv_bias": ("attention_bias",), "qk_norm": ("use_qk_norm",),
        "num_nextn_predict_layers": ("num_nextn_predict_layers", "num_mtp_layers"),
        **{name: (name,) for name in ("first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor")},
    },
    fixed={"score_function": "sigmoid", "expert_bias": True, "router_dtype": "fp32"},
    defaults={"partial_rotary_factor": 0.5},
    required=frozenset({"n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace", "qkv_bias"}),
    only={"hidden_act": "silu", "is_causal": True, "tie_word_embeddings": False},  # SGLang has a head of its own
    partial_rotation=True,
    engine_layout=(*base.ENGINE_EXPERTS, *base.ENGINE_MLP, *base.ENGINE_ATTENTION),
    tiny={**base.TINY, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
          "norm_topk_prob": True, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
          "routed_scaling_factor": 1.5, "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5,
          "num_nextn_predict_layers": 0, "rope_theta": 1000000.0},
)
