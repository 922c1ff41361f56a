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
from tests.reference_bailing import response_logprobs
from tests.tiny_models import write_tiny_bailing

pytestmark = pytest.mark.slow

ERROR, OTHER_WEIGHTS = 0.05, 0.2
"""Mean nats of the sampled tokens between the engine and float32 arithmetic: at most on the same bfloat16 weights, at
least on others. A maximum would be that of a token whose experts nearly tie."""
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
                           max_total_tokens=None if place.on_card else 8192, start_timeout_s=600.0)
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with EngineProcess.from_config(dataclasses.replace(ROLLOUT, engine=options), folder, log_path=log,
                                   model_dtype="bfloat16") as process:
        yield LiveEngine(process, folder, dtype=torch.bfloat16, device=place.device)


def error_of(engine: LiveEngine, weights: dict[str, torch.Tensor]) -> float:
    """The mean over PROMPTS, whose responses the engine samples anew."""
    gaps = [response_logprobs(weights, engine.config, prompt, result.output_ids.tolist())
            - torch.from_numpy(result.logprobs)
            for prompt, result in zip(PROMPTS, engine.generate(PROMPTS, SAMPLING), strict=True)]
    return float(torch.cat(gaps).abs().mean())


@at("cpu")
def test_an_engine_answers_with_the_log_probabilities_of_its_weights(place, engine):
    assert error_of(engine, engine.weights) < ERROR


@pytest.mark.parametrize("transport", ["tensor", "disk"])
@at("cpu")
def test_published_weights_arrive_bit_for_bit(place, engine, transport, tmp_path):
    """The engine's checksums are those of what was sent. It answers by the new weights, and not by the old ones."""
    before, weights = engine.weights, engine.new_weights()
    publisher = TensorPublisher([engine.client], bucket_bytes=BUCKET_BYTES) if transport == "tensor" else \
        DiskPublisher([engine.client], bucket_bytes=BUCKET_BYTES, folder=tmp_path, config_folder=engine.folder)
    engine.publish({name: tensor.to(place.device) for name, tensor in weights.items()}, publisher)
    engine.weights = weights
    assert error_of(engine, weights) < ERROR
    assert error_of(engine, before) > OTHER_WEIGHTS


@at("cpu")
def test_a_colocated_engine_gives_its_memory_up_and_gets_it_back(place, engine):
    memory = EngineMemory(lambda: free_bytes(torch.device(place.device)))

    async def release() -> None:
        async with engine.client:
            assert await memory.release([engine.client]) == [engine.client.base_url]

    asyncio.run(release())
    engine.publish(engine.new_weights(), TensorPublisher([engine.client], bucket_bytes=BUCKET_BYTES, memory=memory))
    assert error_of(engine, engine.weights) < ERROR
    free = memory.free_bytes
    assert list(free) == ["generating", "training", "publishing", "serving"]
    if place.on_card:
        assert free["training"] - max(free["generating"], free["serving"]) > RELEASED_BYTES
