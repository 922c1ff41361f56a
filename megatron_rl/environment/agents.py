"""Agents: programs and functions of the user's that hold a conversation with the model, one for each response.

Each gets a session of the gateway, which is an API key. When it ends, the path to the turn that was answered last is
the response, or with rollout.agent.sequences=individual all turns are. An agent that fails, hangs or asks nothing is a
failed response of its own; the run goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson

from megatron_rl.config.agent import AgentConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.config.rules import require
from megatron_rl.environment.gateway.errors import RequestError
from megatron_rl.environment.gateway.parsing import Parser
from megatron_rl.environment.gateway.probe import checked
from megatron_rl.environment.gateway.server import Gateway, Limits
from megatron_rl.environment.gateway.session import Model, Session
from megatron_rl.foreign import load_function, told
from megatron_rl.rollout.background import in_thread
from megatron_rl.rollout.die_with_parent import with_parent
from megatron_rl.rollout.environment import EnvironmentFailed
from megatron_rl.rollout.fleet import Fleet, FleetError, Tally
from megatron_rl.rollout.responses import Episode, SamplingPlan, Ticket
from megatron_rl.rollout.transcript import Transcript
from megatron_rl.types import Finish, Score

TAIL_BYTES = 2000
"""How much of the end of a program's output its failure shows."""
FETCH_WAIT_S = 20.0
"""How long an environment server that fetches a session is kept waiting for one."""
LEFT_BEHIND_S = 5.0
"""How long the output of a program that has ended is waited for: another that it started may hold it open."""


def check_agent(config: AgentConfig, tokenizer: Any) -> None:
    """ValueError for an agent that could not start: its program, function, chat template or parsers."""
    if config.kind is not None:
        load_agent(config)
        check_conversation(config, tokenizer)


def check_conversation(config: AgentConfig, tokenizer: Any) -> None:
    """ValueError for a chat template or parsers that a gateway could not use."""
    checked(tokenizer, config.history)
    parser = Parser(config.tool_call_parser, config.reasoning_parser)

    async def start() -> None:
        try:
            await parser.start()
        finally:
            await parser.close()

    asyncio.run(start())


def load_agent(config: AgentConfig) -> Callable | None:
    """The function of kind=python. ValueError for a program, function or key that is not there."""
    if config.kind == "http":
        require(bool(os.environ.get(config.key_env)),
                f"rollout.agent.key_env={config.key_env}: that environment variable is not set; environment servers "
                "open sessions with the key in it")
        return None
    if config.kind == "command":
        require(shutil.which(config.command[0]) is not None,
                f"rollout.agent.command={list(config.command)}: no program {config.command[0]} is on PATH")
        return None
    function = load_function("rollout.agent.function", config.function)
    require(inspect.iscoroutinefunction(function),
            f"rollout.agent.function={config.function} must be an async function of (client, task)")
    return function


def model_of(config: RolloutConfig, fleet: Fleet, tokenizer: Any, *, seed: int) -> Model:
    rendering, findings = checked(tokenizer, config.agent.history)
    parser = Parser(config.agent.tool_call_parser, config.agent.reasoning_parser)
    return Model(fleet, rendering, findings, parser, seed, config.max_context_tokens)


class AgentPrograms:
    """responses.Agents: the gateway and what is started at it. Opens at the first response; close() ends all.

    secrets: environment variables that a program does not inherit, as it inherits no MEGATRON_RL_*. verdict: what an
    agent's own reward says.
    """

    def __init__(self, config: RolloutConfig, fleet: Fleet, tokenizer: Any, *, seed: int,
                 verdict: Callable[[float], Score], secrets: frozenset[str] = frozenset()):
        self._config, self._verdict, self._secrets = config.agent, verdict, secrets
        self._function = load_agent(config.agent)
        self._model = model_of(config, fleet, tokenizer, seed=seed)
        fetched = {"key": os.environ[config.agent.key_env], "open_session": self._fetched} if (
            config.agent.kind == "http") else {}
        self.gateway = Gateway(Limits(config.agent.max_body_bytes, config.agent.max_messages), host=config.agent.host,
                               port=config.agent.port, **fetched)
        self._waiting: asyncio.Queue[Session] = asyncio.Queue()
        self._start = {"command": self._command, "python": self._python, "http": self._http}[config.agent.kind]
        # by tag: while agents of training wait for the next step, those of evaluation run
        self._free = defaultdict(lambda: asyncio.Semaphore(config.agent.concurrency))
        self._opening = asyncio.Lock()
        self._ended: list[Session] = []

    async def close(self) -> None:
        await self.gateway.close()
        await self._model.parser.close()

    async def run(self, ticket: Ticket, plan: SamplingPlan, tally: Tally) -> Episode:
        """One agent from its start to its end."""
        async with self._opening:
            if not self.gateway.is_open:
                await self._model.parser.start()
                await self.gateway.start()
        async with self._free[ticket.tag]:
            session = Session(self._model, ticket, plan, tally)
            self.gateway.admit(session)
            failure: EnvironmentFailed | None = None
            try:
                await self._start(session)
            except EnvironmentFailed as error:
                failure = error
            finally:
                await self.gateway.end(session)
        if ticket.tag == "train":
            self._ended.append(session)
        return self._episode(session, failure)

    def _episode(self, session: Session, failure: FleetError | EnvironmentFailed | None) -> Episode:
        """An agent that there was no more room for may fail: its response was cut, as any that is too long."""
        turns, prompt = session.tree.turns, session.ticket.prompt
        if session.cut and turns:
            failure = None
        failure = session.failure or failure
        if not turns:
            silent = EnvironmentFailed(f"rollout.agent, prompt {prompt.id!r}: it ended without a request that was "
                                       "answered")
            return Episode(prompt, Transcript(), "", None, failure or silent)
        last = turns[-1]
        root, transcript = last.transcript(Finish.LENGTH if session.cut else None)
        answer = self._model.rendering.decode(last.result.output_ids.tolist(), with_special=False)
        verdict = None if session.reward is None else self._verdict(session.reward)
        others = session.tree.others() if self._config.sequences == "individual" else []
        return Episode(replace(prompt, token_ids=root), transcript, answer, verdict, failure, tuple(
            sequence.rollout(replace(prompt, token_ids=begin)) for begin, sequence in others))

    async def _command(self, session: Session) -> None:
        """Runs the program with the task on its input. EnvironmentFailed if it fails or takes too long."""
        where = f"rollout.agent, prompt {session.ticket.prompt.id!r}"
        process = await asyncio.create_subprocess_exec(
            *with_parent(self._config.command), env=self._environment(session),
            start_new_session=True, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT)
        tail = asyncio.create_task(_tail(process.stdout))
        told = asyncio.create_task(_tell(process.stdin, orjson.dumps(session.task()) + b"\n"))
        ending = asyncio.create_task(process.wait())
        try:
            if not await self._in_time(session, ending):
                raise EnvironmentFailed(f"{where}: it did not end within rollout.agent.timeout_s="
                                        f"{self._config.timeout_s:g}")
        finally:
            ending.cancel()
            with contextlib.suppress(ProcessLookupError):  # itself, or what it left behind
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            told.cancel()
            await asyncio.wait([tail], timeout=LEFT_BEHIND_S)
            tail.cancel()
        if code := process.returncode:
            wrote = tail.result() if tail.done() and not tail.cancelled() else b""
            raise EnvironmentFailed(f"{where}: it ended with exit code {code}: "
                                    f"{wrote.decode(errors='replace').strip()[-500:]}")

    def _environment(self, session: Session) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items()
                     if not name.startswith("MEGATRON_RL_") and name not in self._secrets}
        url = self.gateway.url
        direct = ",".join(filter(None, [inherited.get("NO_PROXY"), self._config.host]))
        return {**inherited, "NO_PROXY": direct, "no_proxy": direct,
                "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": session.key,
                "ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": session.key,
                "MEGATRON_RL_SESSION_URL": f"{url}/sessions/{session.id}"}

    async def _python(self, session: Session) -> None:
        """Calls the function in a thread and loop of its own, so that it holds nobody up."""
        where = f"rollout.agent.function, prompt {session.ticket.prompt.id!r}"
        call = in_thread(_in_own_loop, self._function, f"{self.gateway.url}/v1", session.key, session.task(),
                         daemon=True)
        try:
            done = await self._in_time(session, call)
        finally:
            call.cancel()  # its session ends with us: nothing that it asks afterwards is answered
        if not done:
            raise EnvironmentFailed(f"{where}: no end within rollout.agent.timeout_s={self._config.timeout_s:g}")
        error = call.exception()
        if error is not None:  # the user's own code: of any kind
            raise EnvironmentFailed(f"{where}: {told(error)}") from error
        if call.result() is not None:
            try:
                session.give_reward(call.result())
            except RequestError as refused:
                raise EnvironmentFailed(f"{where}: it returned {call.result()!r}: {refused}, or None") from refused

    async def _in_time(self, session: Session, ending: asyncio.Future) -> bool:
        """Whether it has ended within timeout_s, without the time for which its requests waited for later steps."""
        began = time.monotonic()
        while (left := began + self._config.timeout_s + session.waited_s - time.monotonic()) > 0 and not ending.done():
            await asyncio.wait([ending], timeout=left)
        return ending.done()

    async def _http(self, session: Session) -> None:
        """Waits until an environment server has fetched the session, and until it has ended it."""
        where = f"rollout.agent, prompt {session.ticket.prompt.id!r}"
        self._waiting.put_nowait(session)
        for event, what in ((session.taken, "no environment server fetched it"), (session.ended, "it did not end")):
            try:
                await asyncio.wait_for(event.wait(), self._config.timeout_s)
            except TimeoutError:
                raise EnvironmentFailed(f"{where}: {what} within rollout.agent.timeout_s="
                                        f"{self._config.timeout_s:g}") from None
        if session.fault is not None:
            raise EnvironmentFailed(f"{where}: {session.fault}")

    async def _fetched(self, body: Mapping[str, Any]) -> Session | None:
        """The session that has waited longest; None if none comes within wait_s of the body."""
        wait_s = body.get("wait_s", FETCH_WAIT_S)
        if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not 0 <= wait_s <= FETCH_WAIT_S:
            raise RequestError(f"wait_s must be a number of seconds from 0 to {FETCH_WAIT_S:g}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while (session := await self._waiting.get()).ended.is_set():  # given up while it waited
                    pass
                session.taken.set()
                return session
        return None

    def take_metrics(self, step: int) -> dict[str, float]:
        """Over the sessions of training up to this step that were not told of yet (docs/metrics.md)."""
        ended = [session for session in self._ended if session.ticket.step <= step]
        self._ended = [session for session in self._ended if session.ticket.step > step]
        if not ended:
            return {}
        turns = sum(len(session.tree.turns) for session in ended)
        individual = self._config.sequences == "individual"
        trained = turns if individual else sum(len(session.tree.turns[-1].path()) for session in ended
                                               if session.tree.turns)
        return {"agent/sessions": len(ended), "agent/turns_mean": turns / len(ended),
                "agent/turns_off_path": turns - trained,
                "agent/misses": sum(session.tree.misses for session in ended),
                "agent/unparsed_turns": sum(session.unparsed for session in ended)}


def _in_own_loop(function: Callable[[Any, Mapping[str, Any]], Awaitable[Any]], url: str, key: str,
                 task: Mapping[str, Any]) -> Any:
    import openai  # here: only runs with such an agent wait for it

    async def talk() -> Any:
        # The gateway speaks plain HTTP. Reading certificates for each client took half of an agent's processor time.
        http = openai.DefaultAsyncHttpxClient(trust_env=False, verify=False)
        # No time-out: an answer may wait for the next step, and rollout.agent.timeout_s ends what hangs.
        async with openai.AsyncOpenAI(base_url=url, api_key=key, http_client=http, timeout=None) as client:
            return await function(client, task)

    return asyncio.run(talk())


async def _tail(stream: asyncio.StreamReader) -> bytes:
    kept = b""
    while chunk := await stream.read(1 << 16):
        kept = (kept + chunk)[-TAIL_BYTES:]
    return kept


async def _tell(stream: asyncio.StreamWriter, text: bytes) -> None:
    """A program that does not read its input is as good as another."""
    with contextlib.suppress(ConnectionError):
        stream.write(text)
        await stream.drain()
        stream.close()
