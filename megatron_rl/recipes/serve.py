"""The gateway of a run on a checkpoint, without training, to develop an agent against. It keeps what was said."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_rl.config.schema import Config
from megatron_rl.environment.agents import check_conversation, model_of
from megatron_rl.environment.gateway.errors import RequestError
from megatron_rl.environment.gateway.messages import Message
from megatron_rl.environment.gateway.server import Gateway, Limits
from megatron_rl.environment.gateway.session import Answered, Asked, Model, Session
from megatron_rl.environment.gateway.tree import Turn
from megatron_rl.model.tokenizer import load_tokenizer
from megatron_rl.orchestrator.serving import Serving
from megatron_rl.prompts import prompt_source
from megatron_rl.rollout.fleet import Tally
from megatron_rl.rollout.responses import SamplingPlan, Ticket
from megatron_rl.types import Prompt

CONVERSATIONS = "conversations.jsonl"
"""A line for each conversation: id, prompt (of the problem, or the first user's text), messages, answer, domain and
reward."""
NO_TASK = Prompt("free", (), "", "", "math")


@dataclass
class ServedSession(Session):
    """A session that outlives the failure of an engine, and whose conversations are written down when it ends."""

    file: Path = field(kw_only=True)
    said: dict[Turn, list[Message]] = field(default_factory=dict)

    async def answer(self, asked: Asked) -> Answered:
        self.failure = None
        answered = await super().answer(asked)
        self.said.pop(answered.turn.parent, None)
        self.said[answered.turn] = [*asked.messages, answered.turn.answer]
        return answered

    async def close(self) -> None:
        await super().close()
        said, self.said = self.said, {}
        if said:
            with self.file.open("ab") as file:
                file.writelines(orjson.dumps(self._row(messages)) + b"\n" for messages in said.values())

    def _row(self, messages: list[Message]) -> dict[str, Any]:
        prompt = self.ticket.prompt
        asked = next((message["content"] for message in messages if message["role"] == "user"), "")
        return {"id": f"{prompt.id}-{self.id}", "prompt": prompt.text or asked, "messages": messages,
                "answer": prompt.answer, "domain": prompt.domain, "reward": self.reward}


def check(config: Config) -> None:
    """ValueError for what would end serving at its start: a chat template, parsers, the first problem of `data`."""
    tokenizer = load_tokenizer(config.model)
    check_conversation(config.rollout.agent, tokenizer)
    next(tasks(config, tokenizer))


def tasks(config: Config, tokenizer: Any) -> Iterator[Prompt]:
    """The problems of `data`, over and over; without data.path of a file, one that asks nothing."""
    if config.data.source == "jsonl" and config.data.path is None:
        while True:
            yield NO_TASK
    source = prompt_source(config, config.data, tokenizer)
    while True:
        yield from (source.prompt(place) for place in range(len(source)))


async def serve(config: Config, tell: Callable[[Gateway, str, Session], None], stop: asyncio.Event) -> None:
    """Serves until `stop` is set. tell: is told the gateway, its key and a session that is open from the start."""
    agent, tokenizer = config.rollout.agent, load_tokenizer(config.model)
    key = os.environ.get(agent.key_env) or secrets.token_urlsafe(32)
    file, problems = Path(config.run.dir) / CONVERSATIONS, tasks(config, tokenizer)
    async with Serving(config) as serving:
        model = model_of(config.rollout, serving.fleet, tokenizer, seed=config.run.seed)
        opened = 0

        async def open_session(body: Mapping[str, Any]) -> Session:
            nonlocal opened
            if unread := body.keys() - {"wait_s"}:
                raise RequestError(f"{', '.join(sorted(unread))}: not read here; a session gets the next problem of "
                                   "data")
            opened += 1
            return _session(model, config, next(problems), opened, file)

        await model.parser.start()
        try:
            async with Gateway(Limits(agent.max_body_bytes, agent.max_messages), host=agent.host, port=agent.port,
                               key=key, open_session=open_session) as gateway:
                first = _session(model, config, NO_TASK, 0, file)
                gateway.admit(first)
                tell(gateway, key, first)
                await stop.wait()
        finally:
            await model.parser.close()


def _session(model: Model, config: Config, prompt: Prompt, number: int, file: Path) -> Session:
    return ServedSession(model, Ticket(prompt, "serve", 0, number, 0), SamplingPlan.from_config(config.rollout),
                         Tally(), file=file)


def run(config: Config, tell: Callable[[Gateway, str, Session], None]) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    async def until_stopped() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(config, tell, stop)

    asyncio.run(until_stopped())
