"""The orchestrator's HTTP server, which the trainer asks (handoff/protocol.py lists requests and answers)."""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from megatron_rl.config.orchestrator import RUN_KEY, OrchestratorConfig
from megatron_rl.handoff.protocol import POLL_S

LOOK_S = 1.0
KEPT = 2
"""Steps whose shards and states are kept: the trainer asks for the one under way, or for the one before."""
LARGEST_OUTCOME = 1 << 30
BACKLOG = 4096
"""Connections that the kernel keeps while the event loop stands still: a heartbeat of every rank, every few seconds."""


class RankHangs(RuntimeError):
    """A rank of the trainer is silent; the message names it."""


@dataclass
class Heard:
    """When a rank was last heard of, and what it said it was doing."""

    at: float
    about: dict[str, Any] = field(default_factory=dict)


class TrainerPort:
    """`async with TrainerPort(options, world_size) as port:` then `await port.execute(command)`, one at a time."""

    def __init__(self, options: OrchestratorConfig, world_size: int):
        self._options, self._world_size = options, world_size
        self._authorization = f"Bearer {os.environ[RUN_KEY]}".encode()
        self._number: int | None = None  # of the command that the trainer asks for; None before it has asked
        self._pending: dict[str, Any] | None = None
        self._outcome: asyncio.Future | None = None
        self._last: dict[str, Any] | None = None
        self._offered = asyncio.Event()
        self._shards: dict[int, list[bytes]] = {}
        self._states: dict[int, bytes] = {}
        self._ranks: dict[int, Heard] = {}

    async def __aenter__(self) -> TrainerPort:
        app = web.Application(middlewares=[self._with_key], client_max_size=LARGEST_OUTCOME)
        app.add_routes([
            web.get(r"/command/{number:\d+}", self._command), web.post(r"/done/{number:\d+}", self._done),
            web.get(r"/step/{step:\d+}/shard/{dp_rank:\d+}", self._shard), web.get(r"/state/{step:\d+}", self._state),
            web.post(r"/heartbeat/{rank:\d+}", self._heartbeat), web.get("/health", self._health)])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._options.host, self._options.port, backlog=BACKLOG).start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._runner.cleanup()

    # ---- what the orchestrator does ----------------------------------------------------------------------

    async def execute(self, kind: str, **arguments: Any) -> dict[str, Any]:
        """Has the trainer carry the command out, and returns its outcome."""
        assert self._pending is None, f"{kind}, while the trainer is busy with {self._pending}"
        self._outcome = asyncio.get_running_loop().create_future()
        self._pending = {"kind": kind, **arguments}
        self._offered.set()
        return await self._outcome

    def offer(self, step: int, shards: list[bytes]) -> None:
        """From here on ranks may pull what they train on in `step`, by data-parallel rank."""
        self._shards[step] = shards
        _forget(self._shards)

    def keep_state(self, step: int, state: bytes) -> None:
        """From here on rank 0 may pull the state after `step` steps."""
        self._states[step] = state
        _forget(self._states)

    async def watch(self) -> None:
        """Raises RankHangs if a rank is silent for orchestrator.hang_timeout_s. Begins once the trainer has asked."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if now - looked > 5 * LOOK_S:  # we ourselves stood still, and they may have spoken meanwhile
                for heard in self._ranks.values():
                    heard.at = now
            looked = now
            if self._number is None:
                continue
            for rank in range(self._world_size):
                heard = self._ranks.setdefault(rank, Heard(now))
                if now - heard.at > self._options.hang_timeout_s:
                    where = f" (pid {heard.about['pid']} on {heard.about['host']})" if heard.about else ""
                    doing = f"; the last it said: {heard.about['doing']}" if heard.about else ""
                    raise RankHangs(f"rank {rank}{where} of the trainer hangs: it has been silent for "
                                    f"orchestrator.hang_timeout_s={self._options.hang_timeout_s:g}{doing}")

    # ---- what the trainer asks ---------------------------------------------------------------------------

    @web.middleware
    async def _with_key(self, request: web.Request, handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, self._authorization):
            return web.Response(status=401, text="the key of the run is missing or wrong")
        return await handler(request)

    async def _command(self, request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        if self._number is None:
            self._number = number
        if number == self._number - 1 and self._last is not None:
            return web.json_response(self._last)
        if number != self._number:
            return web.Response(status=409, text=f"command {number} was asked for, {self._number} is next")
        try:
            await asyncio.wait_for(self._offered.wait(), POLL_S)
        except TimeoutError:
            return web.Response(status=204)
        return web.json_response(self._pending) if self._pending is not None else web.Response(status=204)

    async def _done(self, request: web.Request) -> web.Response:
        """Takes the outcome of the pending command. The outcome of a dead orchestrator's command is ignored."""
        number, outcome = int(request.match_info["number"]), await request.json()
        if number == self._number and self._pending is not None:
            self._last, self._pending, self._number = self._pending, None, number + 1
            self._offered.clear()
            self._outcome.set_result(outcome)
        return web.Response(text="heard")

    async def _shard(self, request: web.Request) -> web.Response:
        step, dp_rank = int(request.match_info["step"]), int(request.match_info["dp_rank"])
        if step not in self._shards:
            return web.Response(status=503, text=f"step {step} has not been offered")
        if dp_rank >= len(self._shards[step]):
            return web.Response(status=404, text=f"step {step} has {len(self._shards[step])} shards")
        return web.Response(body=self._shards[step][dp_rank], content_type="application/octet-stream")

    async def _state(self, request: web.Request) -> web.Response:
        step = int(request.match_info["step"])
        if step not in self._states:
            return web.Response(status=503, text=f"there is no state after {step} steps")
        return web.Response(body=self._states[step], content_type="application/octet-stream")

    async def _heartbeat(self, request: web.Request) -> web.Response:
        self._ranks[int(request.match_info["rank"])] = Heard(time.monotonic(), await request.json())
        return web.Response(text="heard")

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="well")


def _forget(by_step: dict[int, Any]) -> None:
    for step in sorted(by_step)[:-KEPT]:
        del by_step[step]
