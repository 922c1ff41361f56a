"""qwen3: dense, with norms of queries and keys."""

from __future__ import annotations

import megatron_rl.model.families.base as base

FAMILY = base.Family(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    engine_modules=("qwen3", "qwen2"),
    names={**base.NORMS_AND_HEAD, **base.SELF_ATTENTION, **base.QUERY_KEY_NORMS, **base.MLP},
    keys=base.KEYS,
    fixed={**base.NO_EXPERTS, "qk_norm": True},
    defaults={"rope_theta": 10000.0, "head_dim": 128},
    only=base.QWEN_ONLY,
    ignored=base.WINDOW | base.UNUSED,
    engine_layout=(*base.ENGINE_MLP, *base.ENGINE_ATTENTION),
    tiny=base.TINY,
)
