"""Configuration of BailingMoeV2 (Ling 2.0, Ring 2.0), copied beside a checkpoint that has none of its own.

transformers knows no `bailing_moe_v2`; config.json names this file in `auto_map`, and that is all SGLang and
AutoConfig need (with trust_remote_code). Defaults are those of Ling-mini-2.0, except head_dim, which is
hidden_size / num_attention_heads where config.json does not set it.
"""

from transformers.configuration_utils import PretrainedConfig

DEFAULTS = {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-6,
    "norm_head": False,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "output_dropout": 0.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rope_theta": 600000.0,
    "rope_scaling": None,
    "use_cache": True,
    "num_experts": 256,
    "num_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 1.0,
}


class BailingMoeV2Config(PretrainedConfig):
    """Fields of the published config.json; unknown ones are kept as attributes."""

    model_type = "bailing_moe_v2"

    def __init__(self, head_dim=None, bos_token_id=None, eos_token_id=156892, pad_token_id=156892,
                 tie_word_embeddings=False, **kwargs):
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        self.head_dim = head_dim if head_dim is not None else self.hidden_size // self.num_attention_heads
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
                         tie_word_embeddings=tie_word_embeddings, **kwargs)
