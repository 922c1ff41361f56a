"""Claims: a turn through the gateway costs little more than the engine's, and an open session is small.

1. Seconds of conversations of several turns at 64 sessions at a time, over HTTP through the gateway, against the same
   conversations as token ids straight to /generate of the same engine, in turns. All answers have one length.
2. Share of the conversation so far that the engine's prefix cache held, on every turn after the first.
3. With 1,000 sessions that begin at once, whose engine answers at once: memory of a session with all that it keeps, and
   the longest round of the gateway's event loop and its work for a turn in processor time, which other work on the
   machine hardly changes.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.common import Row, main, median
from examples.agent_calculator.learn import write_tokenizer
from megatron_rl.config.rollout import ENGINE_KEY, EngineConfig, RolloutConfig
from megatron_rl.environment.agents import model_of
from megatron_rl.environment.gateway.server import Gateway, Limits
from megatron_rl.environment.gateway.session import Model, Session
from megatron_rl.model.fresh import bailing_config, random_weights
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.engine_command import draw_key
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.fleet import Fleet, Tally
from megatron_rl.rollout.responses import SamplingPlan, Ticket
from megatron_rl.rollout.sampling import GenerateResult, SamplingParams
from megatron_rl.types import Finish, Prompt, VersionSpan

OPEN_SESSIONS = 1000
LIMITS = Limits(1 << 22, 1000)
FOLLOW_UP = "Go on, please."


class WholeAnswers(Fleet):
    """Answers have the length that is asked for, since a random model ends where it likes."""

    async def generate(self, input_ids, *, sampling, **how):
        return await super().generate(input_ids, sampling=replace(sampling, ignore_eos=True, stop_token_ids=()), **how)


class AtOnce:
    """In the place of a fleet: answers of a fixed length, without an engine."""

    def __init__(self, tokens: int):
        self._tokens = tokens

    async def generate(self, input_ids, **_) -> GenerateResult:
        ids = np.arange(self._tokens, dtype=np.int32) % 90 + 20
        return GenerateResult(ids, np.full(self._tokens, -1.0, np.float32), Finish.STOP, {"type": "stop"},
                              (VersionSpan(0, 0, self._tokens),), 0, 0, None)


def session_of(model: Model, config: RolloutConfig, number: int) -> Session:
    return Session(model, Ticket(Prompt(str(number), (), "", "", "math"), "train", 0, number, 0),
                   SamplingPlan.from_config(config), Tally())


async def converse(http: aiohttp.ClientSession, session: Session, number: int, turns: int, tokens: int) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Conversation {number}: tell me more."}]
    for _ in range(turns):
        body = {"model": "policy", "messages": messages, "max_tokens": tokens}
        async with http.post("/v1/chat/completions", json=body,
                             headers={"Authorization": f"Bearer {session.key}"}) as answer:
            answer.raise_for_status()
            said = (await answer.json())["choices"][0]["message"]
        messages += [said, {"role": "user", "content": FOLLOW_UP}]


async def converse_all(url: str, sessions: list[Session], numbers: range, turns: int, tokens: int) -> None:
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0),
                                     timeout=aiohttp.ClientTimeout(total=None, sock_connect=None)) as http:
        await asyncio.gather(*(converse(http, session, number, turns, tokens)
                               for number, session in zip(numbers, sessions, strict=True)))


async def through_gateway(model: Model, config: RolloutConfig, numbers: range, turns: int,
                          tokens: int) -> tuple[float, list[Session]]:
    """(seconds, sessions). The clients have a thread and an event loop of their own."""
    async with Gateway(LIMITS, host="127.0.0.1") as gateway:
        sessions = [session_of(model, config, number) for number in numbers]
        for session in sessions:
            gateway.admit(session)
        began = time.perf_counter()
        await asyncio.to_thread(lambda: asyncio.run(converse_all(gateway.url, sessions, numbers, turns, tokens)))
        return time.perf_counter() - began, sessions


async def straight(fleet: Fleet, first: list[list[int]], follow: list[int], numbers: range, turns: int,
                   tokens: int) -> float:
    async def one(ids: list[int], number: int) -> None:
        for turn in range(turns):
            sampling = SamplingParams(temperature=1.0, max_new_tokens=tokens, seed=number)
            result = await fleet.generate(ids, rid=f"straight-{number}-{turn}", sampling=sampling, tally=Tally(),
                                          routed_layers=None)
            ids = [*ids, *result.output_ids.tolist(), *follow]

    began = time.perf_counter()
    await asyncio.gather(*(one(ids, number) for ids, number in zip(first, numbers, strict=True)))
    return time.perf_counter() - began


async def against_engine(url: str, config: RolloutConfig, tokenizer: Any, *, repeats: int, concurrency: int, turns: int,
                         tokens: int) -> tuple[list[float], list[float], float]:
    """(seconds through the gateway, seconds straight to the engine, share of known tokens that were cached)"""
    fleet = WholeAnswers([EngineClient(url, api_key=os.environ[ENGINE_KEY])], config)
    await fleet.start()
    model, places = model_of(config, fleet, tokenizer, seed=0), itertools.count()
    ours, theirs, sessions = [], [], []
    for repeat in range(-1, repeats):
        numbers = [range(start, start + concurrency) for start in (next(places) * concurrency for _ in range(2))]
        seconds, opened = await through_gateway(model, config, numbers[0], turns, tokens)
        prompts = [session.tree.turns[0].given for session in opened]
        shared = len(os.path.commonprefix(prompts))  # both kinds of prompts differ from here on: as much is cached
        first = [[*prompt[:shared], 20 + place % 90, 20 + repeat % 90, *prompt[shared + 2:]]
                 for place, prompt in enumerate(prompts)]
        follow = list(opened[0].tree.turns[1].given)
        other = await straight(fleet, first, follow, numbers[1], turns, tokens)
        if repeat >= 0:
            ours.append(seconds)
            theirs.append(other)
            sessions += opened
    await fleet.close()
    later = [turn for session in sessions for turn in session.tree.turns[1:]]
    known = sum(turn.parent.tokens - 1 for turn in later)  # no layer has read the last token
    return ours, theirs, sum(turn.result.cached_tokens for turn in later) / known


async def many_open(config: RolloutConfig, tokenizer: Any, sessions: int, turns: int,
                    tokens: int) -> tuple[float, float, float]:
    """(bytes of an open session, processor seconds of the longest round of the event loop and of a turn)"""
    model, rounds = model_of(config, AtOnce(tokens), tokenizer, seed=0), [0.0]

    async def probe() -> None:
        while True:
            begin = time.thread_time()
            await asyncio.sleep(0)
            rounds.append(time.thread_time() - begin)

    await through_gateway(model, config, range(4), turns, tokens)  # what is loaded once
    gc.collect()
    gc.freeze()  # as the orchestrator does with what it imports (compat/quick_imports.py)
    watch = asyncio.create_task(probe())
    _, opened = await through_gateway(model, config, range(sessions), turns, tokens)
    watch.cancel()
    del opened
    begin = time.thread_time()
    await through_gateway(model, config, range(sessions), turns, tokens)
    of_turn = (time.thread_time() - begin) / (sessions * turns)
    tracemalloc.start()
    _, opened = await through_gateway(model, config, range(sessions), turns, tokens)
    held = tracemalloc.get_traced_memory()[0] / len(opened)
    tracemalloc.stop()
    return held, max(rounds), of_turn


def measure(*, quick: bool, repeats: int, tokens: int) -> tuple[list[Row], dict[str, Any]]:
    repeats, tokens, concurrency, turns = (1, 8, 4, 2) if quick else (repeats, tokens, 64, 3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = write_tokenizer(folder / "tokenizer")
        network = bailing_config(vocab_size=len(tokenizer), max_position_embeddings=2048)
        write_hf_folder(folder / "model", network, random_weights(network, 0), tokenizer_from=folder / "tokenizer")
        config = RolloutConfig(max_response_tokens=1800, max_context_tokens=2000, request_timeout_s=1200.0,
                               engine=EngineConfig(max_total_tokens=262144))
        draw_key(config.engine)
        with EngineProcess.from_config(config, folder / "model", log_path=folder / "engine.log") as engine:
            ours, theirs, cached = asyncio.run(against_engine(
                engine.base_url, config, tokenizer, repeats=repeats, concurrency=concurrency, turns=turns,
                tokens=tokens))
        held, stall, of_turn = asyncio.run(many_open(config, tokenizer, 50 if quick else OPEN_SESSIONS, turns, 200))
    turns_run = concurrency * turns
    exact = [Row(f"share of the conversation so far in the prefix cache, {concurrency} sessions", cached, limit=0.95,
                 holds="at least"),
             Row("memory of an open session", held / 2**20, unit="MiB", limit=1.0)]
    timed = [Row(f"seconds of {turns_run} turns of {tokens} tokens, gateway against /generate",
                 median(ours), median(theirs), "s", None if quick else 1.05),
             Row("processor time of the gateway's thread for a turn", of_turn * 1000, unit="ms"),
             Row("longest round of the event loop, processor time", stall * 1000, unit="ms",
                 limit=None if quick else 100.0)]
    return [*timed, *exact], {"gateway_s": ours, "straight_s": theirs, "concurrency": concurrency, "turns": turns}


if __name__ == "__main__":
    main("gateway", measure, repeats=5, tokens=256)
