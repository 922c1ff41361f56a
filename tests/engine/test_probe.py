"""An engine that serves other weights than the trainer's is found by the probe, sent them again, or ends the run."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from megatron_rl.config.rollout import PROBE_TOLERANCES, EngineConfig, RolloutConfig
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.orchestrator.serving import Serving
from megatron_rl.orchestrator.weights import ATTEMPTS, PublishedWeights
from megatron_rl.sync.publish import PublishError
from tests.engine.conftest import ROLLOUT, LiveEngine
from tests.engine.test_faults import PROBE, Trainer, reference


class Altering(Trainer):
    """Sends the weights as they are, but for the first `times` publishes, on whose way one of them is changed."""

    def __init__(self, config: Config, live_engine: LiveEngine, weights: dict, times: int):
        super().__init__(config, live_engine.config, {})
        self._true, self._times, self.sent = weights, times, 0

    async def execute(self, kind: str, **how) -> dict:
        self.sent += 1
        self._weights.update(self._true)
        if self.sent <= self._times:
            self._weights["model.norm.weight"] = self._true["model.norm.weight"] * 3.0
        sent = await super().execute(kind, **how)
        return {**sent, "reference": reference(self._true, self._model).tolist()}


def publish(live_engine: LiveEngine, weights: dict, times: int) -> tuple[int, float]:
    """(how often they were sent, the probe's gap at the end); checksums off, as on a GPU, the probe at its default."""
    engine = replace(ROLLOUT.engine, urls=(live_engine.process.base_url,), health_interval_s=0.2)
    config = Config(model=ModelConfig(path=str(live_engine.folder)),
                    rollout=replace(ROLLOUT, engine=engine, verify_checksums=False))

    async def run() -> tuple[int, float]:
        async with Serving(config) as serving:
            with contextlib.closing(Altering(config, live_engine, weights, times)) as trainer:
                published = PublishedWeights(config, trainer, serving.fleet)
                published.probe_tokens = list(PROBE)
                try:
                    await published.publish(live_engine.version + 1)
                finally:
                    sent.append(trainer.sent)
                return trainer.sent, published.metrics["sync/probe_max_abs"]

    sent: list[int] = []
    try:
        return asyncio.run(run())
    except PublishError as error:
        error.sent = sent[0]
        raise


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_failed_probe_sends_the_weights_again_until_it_passes(live_engine: LiveEngine, times):
    weights = live_engine.new_weights()
    sent, gap = publish(live_engine, weights, times)
    assert sent == times + 1 and gap < PROBE_TOLERANCES["float32"]
    live_engine.weights, live_engine.version = weights, live_engine.version + 1
    live_engine.publish(weights)  # checks the checksums


def test_a_probe_that_never_passes_ends_the_run(live_engine: LiveEngine):
    with pytest.raises(PublishError, match=r"differ by [0-9.]+ from the trainer's, more than "
                                           r"rollout.probe_tolerance=0.01") as raised:
        publish(live_engine, live_engine.new_weights(), 99)
    assert raised.value.sent == ATTEMPTS
    live_engine.version += 1
    live_engine.publish(live_engine.weights)


@pytest.mark.parametrize(("model", "engine", "expected"), [
    ("float32", None, 0.01), ("bfloat16", None, 2.0), ("float32", "bfloat16", 2.0), ("bfloat16", "float32", 2.0),
    ("float32", "float32", 0.01)])
def test_the_tolerance_has_a_default_for_each_dtype(model, engine, expected):
    config = RolloutConfig(engine=EngineConfig(dtype=engine))
    assert config.probe_limit(model) == expected
    assert replace(config, probe_tolerance=0.3).probe_limit(model) == 0.3
