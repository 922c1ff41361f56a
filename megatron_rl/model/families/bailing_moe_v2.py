"""bailing_moe_v2: Ling 2.0 and Ring 2.0 (mini, flash, 1T), with sigmoid scores, an expert bias and groups.

Published checkpoints say model_type bailing_moe; their class is BailingMoeV2ForCausalLM. Ling-1T gives rotary_dim
where the others give partial_rotary_factor. Layers for multi-token prediction lie behind num_hidden_layers, as SGLang
reads them (models/bailing_moe.py: load_weights); inclusionAI's modelling code counts them among num_hidden_layers, and
a checkpoint laid out like that is refused by its tensors' names.
"""

from __future__ import annotations

import megatron_rl.model.families.base as base
from megatron_rl.model.families.bailing_moe import FAMILY as BAILING_MOE

FAMILY = base.Family(
    model_type="bailing_moe_v2",
    class_name="BailingMoeV2ForCausalLM",
    aliases=frozenset({"bailing_moe"}),
    engine_modules=("bailing_moe",),
    names={
        **BAILING_MOE.names, **base.MTP,
        "self_attention.q_layernorm.weight": ("attention.query_layernorm.weight",),
        "self_attention.k_layernorm.weight": ("attention.key_layernorm.weight",),
        "mlp.router.expert_bias": ("mlp.gate.expert_bias",),
    },
    keys={
        **base.KEYS, "qkv_bias": ("use_qkv_bias",), "qk_norm": ("use_qk_norm",),
        "expert_bias": ("moe_router_enable_expert_bias",), "first_k_dense_replace": ("first_k_dense_replace",),
        **{name: (name,) for name in ("score_function", "n_group", "topk_group", "routed_scaling_factor",
                                      "router_dtype", "num_nextn_predict_layers")},
    },
    defaults={"score_function": "sigmoid"},
    required=frozenset({"expert_bias", "n_group", "topk_group", "routed_scaling_factor", "qk_norm"}),
    only={"norm_head": False,  # SGLang's class would divide the head, the published one does not
          "hidden_act": "silu", "is_causal": True, "use_bias": False, "multi_gate": False, "router_type": "topN",
          "use_sliding_window": False, "use_rmsnorm": True},
    not_null=frozenset({"partial_rotary_factor", "n_group", "topk_group", "routed_scaling_factor",
                        "moe_shared_expert_intermediate_size", "rotary_dim"}),
    same={"moe_shared_expert_intermediate_size": "moe_intermediate_size"},
    partial_rotation=True,
    files=("configuration_bailing_moe_v2.py",),
    auto_map={"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
    engine_layout=BAILING_MOE.engine_layout,
    zero_width=BAILING_MOE.zero_width,
    tiny={**BAILING_MOE.tiny, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
          "use_qk_norm": True, "partial_rotary_factor": 0.5, "score_function": "sigmoid", "router_dtype": "fp32",
          "moe_router_enable_expert_bias": True},
)
