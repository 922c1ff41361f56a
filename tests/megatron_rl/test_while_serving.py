"""Whatever waits for engines in a run lets engines that come back catch up meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from megatron_rl.config.schema import Config
from megatron_rl.orchestrator.serving import Serving
from megatron_rl.orchestrator.weights import PublishedWeights
from megatron_rl.rollout.client import EngineClient
from megatron_rl.sync.publish import PublishError
from tests.megatron_rl.rollout.test_fleet import CONFIG, Engine, ask


class Trainer:
    """Sends its weights to whoever it is told, and the engines then label themselves so."""

    def __init__(self, engine: Engine, failures: dict[str, str] | None = None):
        self._engine, self._failures, self.published = engine, failures or {}, []

    async def execute(self, kind: str, *, version: int, urls: list[str], layouts: list) -> dict:
        assert kind == "publish"
        self.published.append((version, urls))
        self._engine.label = version
        return {"failures": self._failures, "bytes": 1, "digests": {}, "reference": [0.0, 0.0], "free_bytes": {}}


def with_engine(use, monkeypatch, failures=None):
    """use(weights, serving, trainer) on an engine that serves version 4 under that label."""
    engine = Engine(4)

    async def nothing(self) -> None:
        return None

    async def zeros(self, tokens, *, rid) -> np.ndarray:
        return np.zeros(2)

    monkeypatch.setattr(EngineClient, "continue_generation", nothing)
    monkeypatch.setattr(EngineClient, "input_logprobs", zeros)

    async def run():
        config = Config(rollout=replace(CONFIG, verify_checksums=False,
                                        engine=replace(CONFIG.engine, urls=(engine.url,))))
        async with engine.serving(), Serving(config) as serving:
            trainer = Trainer(engine, failures and {engine.url: failures})
            return await use(PublishedWeights(config, trainer, serving.fleet), serving, trainer)

    return asyncio.run(run())


def test_an_engine_that_comes_back_meanwhile_catches_up(monkeypatch):
    async def use(weights, serving, trainer):
        await weights.publish(4)
        serving.fleet.published(4, [], {serving.fleet.answering()[0]: "lost its weights"})
        await weights.while_serving(ask(serving.fleet, "eval-3"))
        assert [version for version, _ in trainer.published] == [4, 4]
        assert weights.metrics["sync/version"] == 4

    with_engine(use, monkeypatch)


def test_what_goes_wrong_meanwhile_is_raised(monkeypatch):
    async def fail() -> None:
        raise ValueError("no such problem")

    async def use(weights, serving, trainer):
        with pytest.raises(ValueError, match="no such problem"):
            await weights.while_serving(fail())

    with_engine(use, monkeypatch)


def test_versions_grow_and_a_publish_that_reaches_no_engine_is_tried_again_and_then_an_error(monkeypatch):
    async def use(weights, serving, trainer):
        with pytest.raises(PublishError, match="publishing version 4: no room"):
            await weights.publish(4)
        assert len(trainer.published) == 3
        with pytest.raises(ValueError, match="weight version 4 does not follow 4"):
            await weights.publish(4)

    with_engine(use, monkeypatch, failures="no room")
