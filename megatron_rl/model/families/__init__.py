"""The networks that can be trained: one file is one family, and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megatron_rl.model.families import (
    bailing_moe,
    bailing_moe_v2,
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    llama,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from megatron_rl.model.families.base import Family

FAMILIES: Mapping[str, Family] = MappingProxyType({
    module.FAMILY.model_type: module.FAMILY for module in (
        bailing_moe, bailing_moe_v2, deepseek_v2, deepseek_v3, glm4_moe, llama, qwen2, qwen2_moe, qwen3, qwen3_moe)})
