"""qwen3_moe: experts in every layer, norms of queries and keys, no shared experts."""

from __future__ import annotations

import megatron_rl.model.families.base as base

FAMILY = base.Family(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    engine_modules=("qwen3_moe", "qwen2_moe"),
    names={**base.NORMS_AND_HEAD, **base.SELF_ATTENTION, **base.QUERY_KEY_NORMS, **base.EXPERTS},
    keys={"initializer_range": ("initializer_range",), "num_experts": ("num_experts", "num_local_experts")},
    fixed={"num_shared_experts": 0, "qk_norm": True},
    defaults={"rope_theta": 10000.0},
    only={**base.QWEN_ONLY, "decoder_sparse_step": 1, "mlp_only_layers": [], "first_k_dense_replace": 0,
          "tie_word_embeddings": False,  # SGLang's class has a head of its own in any case
          "qkv_bias": None, "n_shared_experts": None, "shared_expert_intermediate_size": None},
    ignored=base.WINDOW | {"output_router_logits", "router_aux_loss_coef"},
    engine_layout=(*base.ENGINE_EXPERTS, *base.ENGINE_ATTENTION),
    tiny={**base.TINY, **base.TINY_EXPERTS},
)
