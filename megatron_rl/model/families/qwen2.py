"""qwen2: Qwen2 and Qwen2.5, dense, with biases of queries, keys and values."""

from __future__ import annotations

import megatron_rl.model.families.base as base

FAMILY = base.Family(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    engine_modules=("qwen2",),
    names={**base.NORMS_AND_HEAD, **base.SELF_ATTENTION, **base.MLP},
    keys=base.KEYS,
    fixed={**base.NO_EXPERTS, "qkv_bias": True},
    defaults={"rope_theta": 10000.0},
    only=base.QWEN_ONLY,
    ignored=base.WINDOW | base.UNUSED,
    engine_layout=(*base.ENGINE_MLP, *base.ENGINE_ATTENTION),
    tiny=base.TINY,
)
