"""Held-out evaluation of any checkpoint that an engine can serve; no trainer involved."""

from __future__ import annotations

import asyncio

from megatron_rl.config.schema import Config
from megatron_rl.recipes.serving import HeldOut, build_collector, engine_clients, load_tokenizer
from megatron_rl.reward import RewardPool


def run(config: Config, *, model_path: str | None = None, version: int = 0, step: int = 0) -> dict[str, float]:
    """Accuracy on `eval` of what the engines serve; model_path: load that folder into them first, as `version`.

    Values as HeldOut returns them.
    """
    clients = engine_clients(config)
    if model_path is not None:
        asyncio.run(_load(clients, model_path, version))
    with RewardPool(config.reward) as rewards:
        rewards.warm_up()
        tokenizer = load_tokenizer(config.model.path)
        return HeldOut(config, build_collector(config, clients, tokenizer, rewards), tokenizer)(step)


async def _load(clients, model_path: str, version: int) -> None:
    for client in clients:
        await client.update_weights_from_disk(model_path, version=version)
        await client.flush_cache()
        await client.close()
