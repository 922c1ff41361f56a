"""What the engine returns is what the model computes, token by token."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.sampling import SamplingParams
from megatron_rl.sync.tensor import TensorPublisher
from megatron_rl.types import Finish, VersionSpan
from tests.engine.conftest import PROMPTS, LiveEngine, client_of, in_time, running
from tests.reference_bailing import response_logprobs
from tests.tiny_models import CHARACTERS

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)


def character(token: int) -> str:
    return CHARACTERS[token - 1]


def test_logprobs_are_the_models_at_the_sampling_temperature_before_top_p(live_engine: LiveEngine):
    sampling = SamplingParams(temperature=0.7, top_p=0.8, max_new_tokens=16, ignore_eos=True)
    results = live_engine.generate(PROMPTS, sampling)
    assert live_engine.largest_error(PROMPTS, results, temperature=0.7) < 2e-5
    assert live_engine.largest_error(PROMPTS, results, temperature=1.0) > 1e-2


def test_length_limit_ends_a_response_with_length(live_engine: LiveEngine):
    (result,) = live_engine.generate(PROMPTS[:1], GREEDY)
    assert result.finish is Finish.LENGTH
    assert len(result.output_ids) == len(result.logprobs) == 12
    assert result.weight_versions == (VersionSpan(live_engine.version, 0, 12),)


@pytest.fixture()
def first_weights(live_engine: LiveEngine) -> None:
    """The engine gets the folder's weights, whose greedy response to PROMPTS[0] has no end of text in it. Otherwise it
    holds what earlier tests published."""
    live_engine.publish(live_engine.first_weights())
    (free,) = live_engine.generate(PROMPTS[:1], GREEDY)
    assert 0 not in free.output_ids


@pytest.mark.usefixtures("first_weights")
def test_stop_token_ends_the_response_and_stays_in_it(live_engine: LiveEngine):
    (free,) = live_engine.generate(PROMPTS[:1], GREEDY)
    stop = int(free.output_ids[4])
    first = free.output_ids.tolist().index(stop)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=12, stop_token_ids=(stop,))
    (stopped,) = live_engine.generate(PROMPTS[:1], sampling)
    assert stopped.finish is Finish.STOP
    assert stopped.output_ids.tolist() == free.output_ids.tolist()[: first + 1]


@pytest.mark.usefixtures("first_weights")
def test_stop_string_across_tokens_keeps_the_sampled_tokens(live_engine: LiveEngine):
    (free,) = live_engine.generate(PROMPTS[:1], GREEDY)
    text = "".join(character(token) for token in free.output_ids.tolist())
    stop = text[5:7]
    (stopped,) = live_engine.generate(PROMPTS[:1], replace(GREEDY, stop=(stop,)))
    assert stopped.finish is Finish.STOP
    assert stopped.output_ids.tolist() == free.output_ids.tolist()[: text.index(stop) + 2]
    assert len(stopped.logprobs) == len(stopped.output_ids)


def test_refused_request_says_where_and_why(live_engine: LiveEngine):
    with pytest.raises(EngineHTTPError, match=r"POST http://127.0.0.1:\d+/generate: HTTP 400: .*context length"):
        live_engine.generate([[5] * 500], SamplingParams(temperature=1.0, max_new_tokens=50))


@pytest.mark.parametrize("prompt_tokens", [400, 496, *range(504, 512)])
def test_prompt_and_response_fill_the_context_to_its_last_token(live_engine: LiveEngine, prompt_tokens: int):
    """rollout.max_context_tokens=512, as many as the model has positions; a request that goes on may lack one token."""
    room = 512 - prompt_tokens
    (filled,) = live_engine.generate([[5] * prompt_tokens], SamplingParams(1.0, room, ignore_eos=True))
    assert (len(filled.output_ids), filled.finish) == (room, Finish.LENGTH)


def test_nobody_at_the_address_is_reported_with_the_address():
    client = EngineClient(f"http://127.0.0.1:{choose_port(None)}")

    async def ask() -> None:
        async with client:
            assert not await client.is_healthy()
            await client.weight_version()

    with pytest.raises(EngineHTTPError, match=f"GET {client.base_url}/model_info"):
        asyncio.run(ask())


def test_aborted_response_is_returned_as_abort(live_engine: LiveEngine):
    sampling = SamplingParams(temperature=1.0, max_new_tokens=480, ignore_eos=True)

    async def start_and_abort():
        request = await running(live_engine.client, (5, 6), rid="to-abort", sampling=sampling)
        await live_engine.client.abort(request.get_name())
        return await request

    result = in_time(lambda: live_engine.call(start_and_abort()), lambda result: result.finish is not Finish.LENGTH)
    assert result.finish is Finish.ABORT
    assert 0 < len(result.output_ids) < 480


def test_requests_beyond_those_that_run_wait_in_the_engine(live_engine: LiveEngine):
    sampling = SamplingParams(temperature=1.0, max_new_tokens=100, ignore_eos=True)

    async def longest_queue() -> int:
        client = live_engine.client
        requests = [asyncio.create_task(client.generate((5, 6), rid=f"queued-{i}", sampling=sampling))
                    for i in range(40)]
        longest = 0
        while not all(request.done() for request in requests):
            longest = max(longest, await client.waiting_requests())
        assert await client.waiting_requests() == 0
        return longest

    assert in_time(lambda: live_engine.call(longest_queue()), lambda longest: longest >= 8) <= 40  # 32 run at a time


def test_response_that_outlives_a_publish_says_which_weights_sampled_which_tokens(live_engine: LiveEngine):
    """And each part has the log-probabilities of its own weights: no stale key-value cache."""
    sampling = SamplingParams(temperature=1.0, max_new_tokens=240, ignore_eos=True)

    async def generate(new):
        client = client_of(live_engine.client.base_url)
        async with client:
            request = await running(client, (5, 6, 7), rid="long", sampling=sampling)
            await asyncio.to_thread(live_engine.publish, new)
            return await request

    def attempt():
        old, new = live_engine.weights, live_engine.new_weights()
        return asyncio.run(generate(new)), old, new

    result, old, new = in_time(attempt, lambda outcome: outcome[0].weight_versions[-1].version == live_engine.version)
    first, second = result.weight_versions
    assert (first.version, second.version) == (live_engine.version - 1, live_engine.version)
    assert 0 == first.start < first.end == second.start < second.end == 240
    tokens = result.output_ids.tolist()
    under_old = response_logprobs(old, live_engine.config, (5, 6, 7), tokens).numpy()
    under_new = response_logprobs(new, live_engine.config, (5, 6, 7), tokens).numpy()
    assert abs(under_old - result.logprobs)[: first.end].max() < 1e-4
    assert abs(under_new - result.logprobs)[first.end :].max() < 1e-4


def test_prefix_cache_does_not_survive_a_publish(live_engine: LiveEngine):
    prompt = list(range(20, 60))
    live_engine.generate([prompt], GREEDY)
    (cached,) = live_engine.generate([prompt], GREEDY)
    assert cached.cached_tokens > 0
    live_engine.publish(live_engine.new_weights(), TensorPublisher([live_engine.client], bucket_bytes=1 << 20))
    (fresh,) = live_engine.generate([prompt], GREEDY)
    assert fresh.cached_tokens == 0
    assert live_engine.largest_error([prompt], [fresh]) < 1e-4
