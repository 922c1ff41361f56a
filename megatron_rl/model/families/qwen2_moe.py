"""qwen2_moe: Qwen1.5-MoE and Qwen2-57B-A14B, with one shared expert behind a gate, and QKV bias."""

from __future__ import annotations

import megatron_rl.model.families.base as base

FAMILY = base.Family(
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    engine_modules=("qwen2_moe",),
    names={
        **base.NORMS_AND_HEAD, **base.SELF_ATTENTION, **base.EXPERTS,
        "mlp.shared_experts.linear_fc1.weight": (
            "mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        "mlp.shared_experts.linear_fc2.weight": ("mlp.shared_expert.down_proj.weight",),
        "mlp.shared_experts.gate_weight": ("mlp.shared_expert_gate.weight",),
    },
    keys={"initializer_range": ("initializer_range",), "num_experts": ("num_experts", "num_local_experts"),
          "shared_expert_intermediate_size": ("shared_expert_intermediate_size",)},
    fixed={"num_shared_experts": 1, "shared_expert_gate": True, "qkv_bias": True},
    defaults={"rope_theta": 10000.0, "norm_topk_prob": False},
    required=frozenset({"shared_expert_intermediate_size"}),
    only={**base.QWEN_ONLY, "decoder_sparse_step": 1, "mlp_only_layers": [],  # SGLang's class has experts in all layers
          "first_k_dense_replace": 0, "tie_word_embeddings": False,  # and a head of its own
          "qkv_bias": True, "n_shared_experts": None},
    same={"head_dim": "hidden_per_head"},  # SGLang's class knows no other
    ignored=base.WINDOW | {"output_router_logits", "router_aux_loss_coef"},
    engine_layout=(*base.ENGINE_EXPERTS, *base.ENGINE_MLP, *base.ENGINE_ATTENTION),
    tiny={**base.TINY, **base.TINY_EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 64},
)
