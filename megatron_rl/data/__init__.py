"""Prompts: where they come from, how they are rendered, and the order in which they are dealt."""

from megatron_rl.data.chains import chains_tokenizer
from megatron_rl.data.mixture import build_prompts, build_rated_sampler, build_sampler, heldout
from megatron_rl.data.sampler import PassRateSampler, PromptSampler
from megatron_rl.data.sources import Limits, PromptSource, build_source

__all__ = ["Limits", "PassRateSampler", "PromptSampler", "PromptSource", "build_prompts", "build_rated_sampler",
           "build_sampler", "build_source", "chains_tokenizer", "heldout"]
