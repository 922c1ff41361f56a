"""llama: Llama 2, SmolLM2 and relatives, dense."""

from __future__ import annotations

import megatron_rl.model.families.base as base

FAMILY = base.Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    engine_modules=("llama",),
    names={**base.NORMS_AND_HEAD, **base.SELF_ATTENTION, **base.MLP},
    keys=base.KEYS,
    fixed=base.NO_EXPERTS,
    defaults={"rope_theta": 10000.0},
    only={**base.ONLY, "attention_bias": False, "bias": False, "mlp_bias": False, "rope_is_neox_style": True,
          "target_hidden_size": None, "original_max_position_embeddings": None},
    ignored=base.UNUSED | {"pretraining_tp"},
    engine_layout=(*base.ENGINE_MLP, *base.ENGINE_ATTENTION),
    tiny=base.TINY,
)
