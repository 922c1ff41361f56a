"""Conversations over a real engine: what is trained on is what it sampled, also if weights change in the middle."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import openai
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megatron_rl.environment.gateway.parsing import Parser
from megatron_rl.environment.gateway.probe import checked
from megatron_rl.environment.gateway.server import Gateway, Limits
from megatron_rl.environment.gateway.session import Model, Session
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.fleet import Fleet, Tally
from megatron_rl.rollout.responses import SamplingPlan, Ticket
from megatron_rl.rollout.sampling import SamplingParams
from megatron_rl.sync.tensor import TensorPublisher
from megatron_rl.types import Prompt
from tests.engine.conftest import ROLLOUT, LiveEngine, client_of, in_time
from tests.engine.test_engines import DETERMINISTIC
from tests.engine.test_router_replay import layers_of
from tests.reference_bailing import response_logprobs

TEMPLATE = """\
{%- for m in messages %}{{ m.role[0] + ':' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'a:' }}{% endif %}"""
CONFIG = replace(ROLLOUT, max_response_tokens=400)
TURNS, TURN_TOKENS = 3, 60


Disturb = Callable[[Session], Awaitable[object]]


def converse(engine: LiveEngine, plan: SamplingPlan, first: str, disturb: Disturb | None = None,
             urls: Sequence[str] = ()) -> Session:
    """TURNS turns of a conversation that begins with `first`; disturb(session) comes while the second one is sampled.

    urls: engines that are asked before this one.
    """
    async def story() -> Session:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(engine.folder, chat_template=TEMPLATE)
        clients = [client_of(url, timeout_s=300.0) for url in (*urls, engine.process.base_url)]
        fleet = Fleet(clients, CONFIG)
        await fleet.start()
        rendering, findings = checked(tokenizer, "append")
        model = Model(fleet, rendering, findings, Parser(None, None), 0, CONFIG.max_context_tokens)
        session = Session(model, Ticket(Prompt("p", (1,), "", "", "math"), "train", 0, 0, 0), plan, Tally())
        async with Gateway(Limits(1 << 20, 100), host="127.0.0.1") as gateway:
            gateway.admit(session)
            client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=session.key, max_retries=0)
            messages = [{"role": "user", "content": first}]
            for turn in range(TURNS):
                asked = asyncio.create_task(client.chat.completions.create(
                    model="policy", messages=messages, max_tokens=TURN_TOKENS))
                if turn == 1 and disturb is not None:
                    while not asked.done() and not await is_sampling(clients[0]):
                        await asyncio.sleep(0.005)
                    await disturb(session)
                messages += [(await asked).choices[0].message, {"role": "user", "content": "On"}]
            await client.close()
        await fleet.close()
        return session

    return asyncio.run(asyncio.wait_for(story(), 300))


async def is_sampling(client: EngineClient) -> bool:
    loads = (await client._request("GET", "/v1/loads?include=core", None))["loads"]
    return any(load["num_running_reqs"] for load in loads)


@pytest.fixture()
def plan(live_engine: LiveEngine) -> SamplingPlan:
    return SamplingPlan.from_config(CONFIG, layers_of(live_engine))


def test_trained_tokens_logprobs_and_experts_are_the_engines(live_engine: LiveEngine, plan):
    """Every turn is read from the tokens of the turns before it, and the model itself agrees on each token."""
    session = converse(live_engine, plan, "Hello")
    assert session.tree.misses == 0 and len(session.tree.turns[-1].path()) == len(session.tree.turns) == TURNS
    prompt, transcript = session.tree.turns[-1].transcript()
    sampled = np.concatenate([turn.result.output_ids for turn in session.tree.turns])
    assert transcript.token_ids[transcript.sampled].tolist() == sampled.tolist()
    whole = torch.from_numpy(transcript.token_ids)
    expected = response_logprobs(live_engine.weights, live_engine.config, prompt, whole.tolist())
    error = (expected - torch.from_numpy(transcript.logprobs))[torch.from_numpy(transcript.sampled)].abs().max()
    assert error < 2e-5
    rows = len(prompt) + len(transcript.token_ids) - 1
    assert transcript.routed_experts.shape[0] == rows
    single = live_engine.call(live_engine.client.generate(
        [*prompt, *transcript.token_ids.tolist()], rid="again",
        sampling=SamplingParams(temperature=1.0, max_new_tokens=1), routed_layers=layers_of(live_engine)))
    same = (np.sort(transcript.routed_experts) == np.sort(single.routed_experts[:rows])).all(axis=(1, 2))
    assert same.mean() > 0.99, "the experts of a turn stand at its own tokens"
    cached = [turn.result.cached_tokens for turn in session.tree.turns[1:]]
    known = [turn.tokens for turn in session.tree.turns[:-1]]
    assert all(hit >= 0.95 * (tokens - 1) for hit, tokens in zip(cached, known, strict=True)), (cached, known)


PLAN = SamplingPlan.from_config(CONFIG)


@pytest.fixture(scope="module")
def deterministic_engine(model_folder, tmp_path_factory) -> Iterator[LiveEngine]:
    log_path = tmp_path_factory.mktemp("deterministic") / "engine.log"
    with EngineProcess.from_config(DETERMINISTIC, model_folder, log_path=log_path) as process:
        yield LiveEngine(process, model_folder)


def same_conversation(engine: LiveEngine, plan: SamplingPlan, disturbed_one: Callable[[str], Session],
                      was_in_time: Callable[[Session], bool]) -> Session:
    """The conversation that was disturbed in the middle of a turn, which has the tokens of a quiet one."""
    names = iter("ABCDEFGHIJ")

    def attempt() -> tuple[str, Session]:
        first = next(names)
        return first, disturbed_one(first)

    first, disturbed = in_time(attempt, lambda outcome: was_in_time(outcome[1]))
    quiet = converse(engine, plan, first)
    assert disturbed.tree.turns[-1].token_ids() == quiet.tree.turns[-1].token_ids()
    assert disturbed.tree.misses == 0 and len(disturbed.tree.turns) == TURNS
    return disturbed


def test_a_publish_in_the_middle_of_a_turn_gives_the_same_conversation(deterministic_engine: LiveEngine):
    """The same weights under a new version: the turn goes on from its tokens, and the agent sees one answer."""
    engine = deterministic_engine

    async def publish(_: Session) -> None:
        await asyncio.to_thread(engine.publish, engine.weights)

    disturbed = same_conversation(engine, PLAN, lambda first: converse(engine, PLAN, first, publish),
                                  lambda session: len(session.tree.turns[1].result.weight_versions) == 2)
    spans = disturbed.tree.turns[-1].transcript()[1].weight_versions
    before, after = engine.version - 1, engine.version
    assert [span.version for span in spans] == [before, before, after, after]


def test_an_engine_that_aborts_a_turn_gives_the_same_conversation(deterministic_engine: LiveEngine):
    async def abort(session: Session) -> None:
        client = client_of(deterministic_engine.process.base_url)
        await client.abort(f"{session.ticket.rid}-{session.id}-2-0.")
        await client.close()

    same_conversation(deterministic_engine, PLAN, lambda first: converse(deterministic_engine, PLAN, first, abort),
                      lambda session: session.tally.retries == 1)


def test_an_engine_that_is_killed_in_the_middle_of_a_turn_gives_the_same_conversation(
        deterministic_engine: LiveEngine, tmp_path):
    """kill -9; the turn is sampled by another engine, and the agent sees one answer."""
    engine = deterministic_engine

    def with_victim(first: str) -> Session:
        with EngineProcess.from_config(DETERMINISTIC, engine.folder, log_path=tmp_path / f"{first}.log") as victim:
            engine.publish(engine.weights, TensorPublisher(
                [engine.client, client_of(victim.base_url, timeout_s=300.0)], bucket_bytes=1 << 20))

            async def kill(_: Session) -> None:
                os.kill(victim.pid, signal.SIGKILL)

            return converse(engine, PLAN, first, kill, [victim.base_url])

    same_conversation(engine, PLAN, with_victim, lambda session: session.tally.retries == 1)
