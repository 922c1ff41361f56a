"""Held-out evaluation of any checkpoint that an engine can serve; no trainer involved."""

from __future__ import annotations

from megatron_rl.config.schema import Config
from megatron_rl.recipes.serving import HeldOut, Serving, load_tokenizer
from megatron_rl.reward import RewardPool


def run(config: Config) -> dict[str, float]:
    """Accuracy on `eval` of what the engines serve; values as HeldOut returns them."""
    with RewardPool(config.reward) as rewards, Serving(config) as serving:
        rewards.warm_up()
        return HeldOut(config, serving, load_tokenizer(config.model.path), rewards)(step=0)
