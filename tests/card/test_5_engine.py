"""An engine in bfloat16 that shares the card: a request, published weights, memory given up and taken back."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from megatron_rl.config.rollout import EngineConfig
from megatron_rl.recipes.quickstart import FLASH_HEAD_DIM
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.sampling import SamplingParams
from megatron_rl.sync.disk import DiskPublisher
from megatron_rl.sync.memory import EngineMemory, free_bytes
from megatron_rl.sync.tensor import TensorPublisher
from tests.card.place import at, check_engine_packages
from tests.engine.conftest import PROMPTS, ROLLOUT, LiveEngine
from tests.tiny_models import write_tiny_bailing

pytestmark = pytest.mark.slow

LOGPROB_MAX = 0.15
"""Nats between the engine and float32 arithmetic on the same bfloat16 weights."""
RELEASED_BYTES = 4 << 30
"""The engine gives up more than this on a card: its cache, which takes 30% of the memory."""
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8, ignore_eos=True)
BUCKET_BYTES = 1 << 16


@pytest.fixture(scope="module")
def engine(place, tmp_path_factory) -> Iterator[LiveEngine]:
    check_engine_packages(place)
    folder = write_tiny_bailing(tmp_path_factory.mktemp("model") / "tiny", torch_dtype="bfloat16", norm_head=True,
                                hidden_size=128, head_dim=FLASH_HEAD_DIM, moe_intermediate_size=64)
    options = EngineConfig(device=place.device, colocate=True, max_running_requests=32, mem_fraction_static=0.3,
                           max_total_tokens=None if place.on_card else 8192, start_timeout_s=300.0)
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with EngineProcess.from_config(dataclasses.replace(ROLLOUT, engine=options), folder, log_path=log,
                                   model_dtype="bfloat16") as process:
        yield LiveEngine(process, folder, dtype=torch.bfloat16, device=place.device)


def error_of(engine: LiveEngine, **weights) -> float:
    return engine.largest_error(PROMPTS, engine.generate(PROMPTS, SAMPLING), **weights)


@at("cpu")
def test_an_engine_answers_with_the_log_probabilities_of_its_weights(place, engine):
    assert error_of(engine) < LOGPROB_MAX


@pytest.mark.parametrize("transport", ["tensor", "disk"])
@at("cpu")
def test_published_weights_arrive_bit_for_bit(place, engine, transport, tmp_path):
    """The engine's checksums are those of what was sent. It answers by the new weights, and not by the old ones."""
    before, weights = engine.weights, engine.new_weights()
    publisher = TensorPublisher([engine.client], bucket_bytes=BUCKET_BYTES) if transport == "tensor" else \
        DiskPublisher([engine.client], bucket_bytes=BUCKET_BYTES, folder=tmp_path, config_folder=engine.folder)
    engine.publish({name: tensor.to(place.device) for name, tensor in weights.items()}, publisher)
    engine.weights = weights
    assert error_of(engine) < LOGPROB_MAX < error_of(engine, weights=before)


@at("cpu")
def test_a_colocated_engine_gives_its_memory_up_and_gets_it_back(place, engine):
    memory = EngineMemory(lambda: free_bytes(torch.device(place.device)))

    async def release() -> None:
        async with engine.client:
            assert await memory.release([engine.client]) == [engine.client.base_url]

    asyncio.run(release())
    engine.publish(engine.new_weights(), TensorPublisher([engine.client], bucket_bytes=BUCKET_BYTES, memory=memory))
    assert error_of(engine) < LOGPROB_MAX
    free = memory.free_bytes
    assert list(free) == ["generating", "training", "publishing", "serving"]
    if place.on_card:
        assert free["training"] - max(free["generating"], free["serving"]) > RELEASED_BYTES
