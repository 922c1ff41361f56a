"""A gateway over an engine that says what a test wants: `async with world(script) as it:`.

script(text that the model reads) -> text that it says, or token ids. The engine answers in SGLang's /generate shape,
one token per character; what it says ends with the tokenizer's end token unless the script adds CUT.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from megatron_rl.config.rollout import ENGINE_KEY, RolloutConfig
from megatron_rl.environment.gateway.parsing import Parser
from megatron_rl.environment.gateway.probe import checked
from megatron_rl.environment.gateway.rendering import History
from megatron_rl.environment.gateway.server import Gateway, Limits
from megatron_rl.environment.gateway.session import Model, Session
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.fleet import Fleet, Tally
from megatron_rl.rollout.responses import SamplingPlan, Ticket
from megatron_rl.types import Prompt
from tests.megatron_rl.environment.templates import CHATML, tokenizer_with
from tests.stub_engine import StubEngine

CUT = "\0"
CONFIG = RolloutConfig(prompts_per_step=1, responses_per_prompt=2, max_response_tokens=2000, max_context_tokens=4000,
                       retries=0)
PROMPT = Prompt("p", (1, 2), "Question?", "42", "math")
OWN_KEY = "the gateway's own key"
LIMITS = Limits(1 << 20, 100)
Script = Callable[[str], str | list[int]]


class ScriptedEngine(StubEngine):
    """asked: the bodies of all requests, in order; aborted: the ids of requests that were given up."""

    def __init__(self, tokenizer: Any, script: Script, latency_s: float = 0.0):
        super().__init__(len(tokenizer), latency_s)
        self._tokenizer, self._script = tokenizer, script
        self.asked: list[dict[str, Any]] = []
        self.aborted: list[str] = []

    async def _info(self, request):
        if request.headers.get("Authorization") != f"Bearer {os.environ[ENGINE_KEY]}":
            return web.Response(status=401)
        return await super()._info(request)

    async def _obey(self, request):
        if request.path == "/abort_request":
            self.aborted.append((await request.json())["rid"])
        return await super()._obey(request)

    async def _generate(self, request):
        self.asked.append(await request.json())
        return await super()._generate(request)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling, read = body["sampling_params"], body["input_ids"]
        said = self._script(self._tokenizer.decode(read, skip_special_tokens=False))
        finish: dict[str, Any] = {"type": "stop", "matched": self._tokenizer.eos_token_id}
        said, own = ("", said) if isinstance(said, list) else (said, None)
        cuts = [(said.index(stop) + len(stop), stop) for stop in sampling.get("stop", ()) if stop in said]
        if cuts:
            end, stop = min(cuts)
            said, finish = said[:end] + CUT, {"type": "stop", "matched": stop}
        tokens = own or self._tokenizer.encode(said.removesuffix(CUT), add_special_tokens=False)
        tokens += [] if own or said.endswith(CUT) else [self._tokenizer.eos_token_id]
        if len(tokens) > sampling["max_new_tokens"]:
            tokens, finish = tokens[:sampling["max_new_tokens"]], {"type": "length"}
        meta = {"id": body["rid"], "cached_tokens": 0, "num_retractions": 0,
                "output_token_logprobs": [[-(1 + place % 7) / 8, token, None] for place, token in enumerate(tokens)],
                "weight_versions": [{"version": str(self.label), "start": 0, "end": len(tokens)}],
                "finish_reason": finish}
        return {"output_ids": tokens, "meta_info": meta}


@dataclass
class World:
    gateway: Gateway
    engine: ScriptedEngine
    fleet: Fleet
    model: Model
    config: RolloutConfig
    tokenizer: Any
    tally: Tally = field(default_factory=Tally)

    def session(self, sample: int = 0, prompt: Prompt = PROMPT) -> Session:
        session = Session(self.model, Ticket(prompt, "train", 0, 0, sample), SamplingPlan.from_config(self.config),
                          self.tally)
        self.gateway.admit(session)
        return session

    def text(self, token_ids) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False)


@contextlib.asynccontextmanager
async def world(script: Script, *, template: str = CHATML, history: History = "append", parser: Parser | None = None,
                config: RolloutConfig = CONFIG, limits: Limits = LIMITS, end: str = "<|im_end|>",
                latency_s: float = 0.0, tokenizer: Any = None) -> AsyncIterator[World]:
    tokenizer = tokenizer or tokenizer_with(template, end=end)
    with ScriptedEngine(tokenizer, script, latency_s) as engine:
        fleet = Fleet([EngineClient(engine.url, api_key=os.environ[ENGINE_KEY])], config)
        await fleet.start()
        rendering, findings = checked(tokenizer, history)
        model = Model(fleet, rendering, findings, parser or Parser(None, None), 0, config.max_context_tokens)
        opened: list[World] = []

        async def open_session(body) -> Session:
            return Session(model, Ticket(PROMPT, "serve", 0, 0, body["sample"]), SamplingPlan.from_config(config),
                           opened[0].tally)

        gateway = Gateway(limits, host="127.0.0.1", key=OWN_KEY, open_session=open_session)
        try:
            async with gateway:
                opened.append(World(gateway, engine, fleet, model, config, tokenizer))
                yield opened[0]
        finally:
            await fleet.close()


def run(coroutine) -> Any:
    """To its end, within five minutes: programs and parsers start slowly on a busy machine."""
    return asyncio.run(asyncio.wait_for(coroutine, 300))
