"""Whatever waits for engines in a run lets engines that come back catch up meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_rl.config.schema import Config
from megatron_rl.model.network import Network
from megatron_rl.recipes.parts import RunRecord, while_serving
from megatron_rl.recipes.serving import Serving
from tests.megatron_rl.rollout.test_fleet import CONFIG, Engine, ask

NETWORK = Network("bailing_moe", *[1] * 15, norm_topk_prob=True)
ALONE = SimpleNamespace(is_main=True, broadcast_object=lambda value: value)


class Weights:
    """Publishes version 4 to whoever is behind, and counts how often."""

    def __init__(self, serving: Serving):
        self._serving, self.caught_up = serving, 0

    def catch_up(self) -> None:
        urls = self._serving.fleet.behind()
        self._serving.tell(self._serving.fleet.updating, 4, urls)
        self._serving.tell(self._serving.fleet.published, 4, urls, {})
        self.caught_up += 1


def with_engine_behind(use):
    """use(serving, weights) while the only engine answers but lacks version 4, as after a restart."""
    engine = Engine(4)
    config = Config(rollout=replace(CONFIG, engine=replace(CONFIG.engine, urls=(engine.url,))))

    def work():
        with Serving(config) as serving:
            serving.tell(serving.fleet.published, 4, [], {})
            return use(serving, Weights(serving))

    async def run():
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(engine.serving())
            return await asyncio.to_thread(work)

    return asyncio.run(run())


def test_an_engine_that_comes_back_during_evaluation_catches_up():
    logged = []

    def use(serving: Serving, weights: Weights) -> None:
        async def evaluate(step: int) -> dict[str, float]:
            await ask(serving.fleet, f"eval-{step}")
            return {"accuracy": 0.5}

        record = RunRecord(None, ALONE, network=NETWORK, evaluator=SimpleNamespace(evaluate=evaluate),
                           log=SimpleNamespace(log_eval=lambda *row: logged.append(row)), serving=serving,
                           rollouts=None, weights=weights, save=None, poll_save=None,
                           stage=SimpleNamespace(options=None))
        record.evaluate(3, "during")
        assert weights.caught_up == 1

    with_engine_behind(use)
    assert logged == [(3, "during", {"accuracy": 0.5})]


def test_what_goes_wrong_meanwhile_is_raised():
    async def fail() -> None:
        raise ValueError("no such problem")

    with pytest.raises(ValueError, match="no such problem"):
        with_engine_behind(lambda serving, weights: while_serving(ALONE, weights, serving, fail()))


def test_other_ranks_follow_the_first_until_it_is_done():
    orders, caught_up = [False, False, True], []
    here = SimpleNamespace(broadcast_object=lambda value: orders.pop(0))
    weights = SimpleNamespace(catch_up=lambda: caught_up.append(1))
    assert while_serving(here, weights, None, None) is None
    assert len(caught_up) == 2 and orders == []
