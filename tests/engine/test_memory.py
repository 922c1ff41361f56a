"""Engines that share the trainer's GPUs give up their memory and get it back, in an order that they survive.

On CPU the engine obeys every call and keeps its memory; tested is when it is asked, and that it goes on serving.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import Any

import pytest

from megatron_rl.config.rollout import ENGINE_KEY
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.rollout.sampling import SamplingParams
from megatron_rl.rollout.supervisor import LOADED, NOTHING_PUBLISHED
from megatron_rl.sync.memory import CACHE, WEIGHTS, EngineMemory
from megatron_rl.sync.tensor import TensorPublisher
from tests.engine.conftest import PROMPTS, LiveEngine, in_time, running

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=12, ignore_eos=True)


class Recording(EngineClient):
    """Records each call to the engine with the memory that it is about, and the calls that the engine refused."""

    def __init__(self, url: str):
        super().__init__(url, timeout_s=300.0, api_key=os.environ[ENGINE_KEY])
        self.asked: list[str] = []
        self.refused: list[str] = []

    async def _post(self, path: str, body: Any, *, timeout_s: float | None = None) -> Any:
        self.asked.append(" ".join([path.strip("/"), *(body or {}).get("tags", ())]))
        try:
            return await super()._post(path, body, timeout_s=timeout_s)
        except EngineHTTPError:
            self.refused.append(path.strip("/"))
            raise


@pytest.fixture()
def client(live_engine: LiveEngine) -> Recording:
    return Recording(live_engine.process.base_url)


@pytest.fixture()
def memory() -> EngineMemory:
    """Memory that has one byte less at every look."""
    return EngineMemory(itertools.count(1000, -1).__next__)


async def release(memory: EngineMemory, client: EngineClient) -> list[str]:
    async with client:
        return await memory.release([client])


def test_memory_is_released_for_training_and_given_back_around_the_publish(live_engine, client, memory):
    publisher = TensorPublisher([client], bucket_bytes=1 << 30, memory=memory)
    live_engine.publish(live_engine.new_weights(), publisher)
    assert not any("memory" in call for call in client.asked)  # nothing had been released
    for _ in range(2):
        client.asked.clear()
        assert asyncio.run(release(memory, client)) == [client.base_url]
        live_engine.publish(live_engine.new_weights(), publisher)
        assert [call for call, _ in itertools.groupby(client.asked)] == [  # it flushes until the engine is at rest
            "flush_cache", " ".join(["release_memory_occupation", *CACHE, *WEIGHTS]), "update_weight_version",
            "pause_generation", " ".join(["resume_memory_occupation", *WEIGHTS]),
            "begin_weight_update", "update_weights_from_tensor", "end_weight_update",
            " ".join(["resume_memory_occupation", *CACHE]), "flush_cache", "continue_generation"]
        assert live_engine.largest_error(PROMPTS, live_engine.generate(PROMPTS, SAMPLING)) < 1e-4
    phases = [memory.free_bytes[phase] for phase in ("generating", "training", "publishing", "serving")]
    assert phases == sorted(phases, reverse=True) and len(set(phases)) == 4


def test_it_is_not_released_under_a_running_request(live_engine, client, memory):
    async def both() -> list[str]:
        async with client:
            request = await running(client, PROMPTS[0], rid="running",
                                    sampling=SamplingParams(1.0, 400, ignore_eos=True))
            client.asked.clear()
            client.refused.clear()
            await memory.release([client])
            assert client.asked == [*client.refused, "flush_cache",  # the first flush that the engine does
                                    " ".join(["release_memory_occupation", *CACHE, *WEIGHTS]), "update_weight_version"]
            assert len((await request).output_ids) == 400
            return list(client.refused)

    def attempt() -> list[str]:
        refused = asyncio.run(both())
        live_engine.publish(live_engine.weights, TensorPublisher([client], bucket_bytes=1 << 30, memory=memory))
        return refused

    assert set(in_time(attempt, bool)) == {"flush_cache"}  # while the request ran
    assert live_engine.largest_error(PROMPTS, live_engine.generate(PROMPTS, SAMPLING)) < 1e-4


def test_an_engine_that_was_started_again_has_nothing_to_get_back(live_engine, client, memory):
    async def release_and_relabel() -> None:
        async with client:
            await memory.release([client])
            await client.label_weights(NOTHING_PUBLISHED)

    asyncio.run(release_and_relabel())
    live_engine.publish(live_engine.weights, TensorPublisher([client], bucket_bytes=1 << 30, memory=memory))
    assert not any(call.startswith("resume_memory") for call in client.asked)
    asyncio.run(client_resumes(client))  # in truth it was not


@pytest.mark.parametrize("label", [NOTHING_PUBLISHED, LOADED])
def test_an_engine_that_released_before_any_publish_gets_its_memory_back(live_engine, client, memory, label):
    """Ranks are built while engines that have just been started have released."""
    async def label_and_release() -> None:
        async with client:
            await client.label_weights(label)
            await memory.release([client])

    asyncio.run(label_and_release())
    live_engine.publish(live_engine.weights, TensorPublisher([client], bucket_bytes=1 << 30, memory=memory))
    assert [call for call in client.asked if call.startswith("resume_memory")] == [
        " ".join(["resume_memory_occupation", *WEIGHTS]), " ".join(["resume_memory_occupation", *CACHE])]


def test_an_engine_that_was_started_again_after_a_failed_publish_releases_all(live_engine, client, memory):
    """The publish had given the weights back, and not the cache. A new server has both."""
    async def fail_and_start_again() -> None:
        async with client:
            await memory.release([client])
            await memory.resume_weights(client)
            await client.resume_memory_occupation([*CACHE])
            await client.label_weights(NOTHING_PUBLISHED)
            client.asked.clear()
            await memory.release([client])

    asyncio.run(fail_and_start_again())
    assert " ".join(["release_memory_occupation", *CACHE, *WEIGHTS]) in client.asked
    live_engine.publish(live_engine.weights, TensorPublisher([client], bucket_bytes=1 << 30, memory=memory))


@pytest.mark.parametrize("action", ["release", "publish"])
def test_a_later_trainer_knows_what_an_engine_released(live_engine, client, memory, action):
    """SGLang dies if it is asked to release what it has released. Weights need their memory back before they arrive."""
    asyncio.run(release(memory, client))
    client.asked.clear()
    later = EngineMemory(lambda: 0)
    if action == "release":
        assert asyncio.run(release(later, client)) == [client.base_url]
        assert not client.asked
    live_engine.publish(live_engine.weights, TensorPublisher([client], bucket_bytes=1 << 30, memory=later))
    assert " ".join(["resume_memory_occupation", *WEIGHTS]) in client.asked


async def client_resumes(client: EngineClient) -> None:
    async with client:
        await client.resume_memory_occupation([*CACHE, *WEIGHTS])
