"""deepseek_v2: DeepSeek-V2 and V2-Lite, with latent attention, softmax scores, shared experts, dense first layers.

SGLang gives the norms of the latent vectors rms_norm_eps, and so does this project. transformers and DeepSeek's own
code give them 1e-6, which is the rms_norm_eps of DeepSeek's checkpoints.
"""

from __future__ import annotations

import megatron_rl.model.families.base as base

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace", "n_group",
          "topk_group", "topk_method", "routed_scaling_factor")
_ATTENTION = {
    "linear_q_proj": "q_proj", "linear_q_down_proj": "q_a_proj", "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj", "linear_kv_down_proj": "kv_a_proj_with_mqa", "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj", "linear_proj": "o_proj",
}
FAMILY = base.Family(
    model_type="deepseek_v2",
    class_name="DeepseekV2ForCausalLM",
    engine_modules=("deepseek_v2",),
    names={
        **base.NORMS_AND_HEAD, **base.MLP, **base.EXPERTS, **base.SHARED_EXPERTS,
        "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
        **{f"self_attention.{ours}.weight": (f"self_attn.{theirs}.weight",) for ours, theirs in _ATTENTION.items()},
    },
    keys={
        **base.KEYS, "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
        "num_shared_experts": ("n_shared_experts",), "score_function": ("scoring_func",),
        "q_lora_rank": ("q_lora_rank",), **{name: (name,) for name in _SIZES},
    },
    fixed={"norm_topk_prob": False},
    defaults={"rope_theta": 10000.0},
    present=frozenset({"q_lora_rank", "moe_layer_freq"}),
    required=frozenset({*_SIZES, "score_function"}),
    only={**base.ONLY, "scoring_func": "softmax", "moe_layer_freq": 1, "rope_interleave": True,
          "norm_topk_prob": False,  # transformers never divides, SGLang would
          "attention_bias": False, "mlp_bias": False, "llama_4_scaling": None, "mla_nope": False, "num_hash_layers": 0,
          "router_fp32": False, "swiglu_limit": None},
    same={"head_dim": "qk_rope_head_dim"},  # as transformers 5 writes it
    ignored=frozenset({"pretraining_tp", "routing_method_type", "indexer_rope_interleave", "output_router_logits"}),
    engine_layout=(*base.ENGINE_EXPERTS, *base.ENGINE_MLP),
    engine_latent_layout=tuple(
        (rf"(?P<attention>.*\.self_attn)\.{part}\.weight", "{attention}.fused_qkv_a_proj_with_mqa.weight", (2, place),
         None) for place, part in enumerate(("q_a_proj", "kv_a_proj_with_mqa"))),
    tiny={**{key: value for key, value in base.TINY.items() if key != "head_dim"}, "num_key_value_heads": 4,
          "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
          "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
          "first_k_dense_replace": 1, "moe_layer_freq": 1, "scoring_func": "softmax", "topk_method": "greedy",
          "norm_topk_prob": False, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
)
