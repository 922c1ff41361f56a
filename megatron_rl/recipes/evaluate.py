"""Held-out evaluation of any checkpoint that an engine can serve; no trainer involved."""

from __future__ import annotations

from megatron_rl.config.schema import Config
from megatron_rl.recipes.serving import HeldOut, build_collector, engine_clients, load_tokenizer
from megatron_rl.reward import RewardPool


def run(config: Config) -> dict[str, float]:
    """Accuracy on `eval` of what the engines serve; values as HeldOut returns them."""
    clients = engine_clients(config)
    with RewardPool(config.reward) as rewards:
        rewards.warm_up()
        tokenizer = load_tokenizer(config.model.path)
        return HeldOut(config, build_collector(config, clients, tokenizer, rewards), tokenizer)(step=0)
