"""Lets sglang-router spread the requests. It only knows the engines that serve.

Written for sglang-router 0.3.2. It is a proxy, so we do not know which engine answered. Failures therefore count
against the router, an abort goes to every engine, and if an engine fails a publish, all requests under way are sent
again. Engines are registered and removed as the watch sees them come and go (rollout.engine.health_interval_s). The
router drops fields of a request that it does not know, return_routed_experts among them.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import time
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.rollout import ENGINE_KEY, EngineConfig, RolloutConfig
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError, well_formed
from megatron_rl.rollout.engine_command import engine_key
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.fleet import ABORT_GRACE_S, Fleet
from megatron_rl.rollout.member import Member
from megatron_rl.rollout.ports import choose_port


def router_process(engine: EngineConfig, log_path: Path, taken_ports: Sequence[int]) -> EngineProcess:
    """A router on loopback, not yet started. ValueError when the package is not installed."""
    if importlib.util.find_spec("sglang_router") is None:
        raise ValueError("rollout.engine.router=local needs the package sglang-router, which is not installed: "
                         "pip install sglang-router, or leave rollout.engine.router unset")
    port = choose_port(None, taken_ports)
    metrics_port = choose_port(None, [*taken_ports, port])
    argv = [sys.executable, "-m", "megatron_rl.compat.router_key", "--host", "127.0.0.1", "--port", str(port),
            "--policy", engine.router_policy, "--disable-retries", "--log-level", "warn",
            "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    environment = {**os.environ, ENGINE_KEY: engine_key(engine)}
    return EngineProcess(argv, environment, port=port, log_path=log_path, health_path="/liveness",
                         start_timeout_s=engine.start_timeout_s, stop_timeout_s=engine.stop_timeout_s)


class RouterClient(EngineClient):
    """The router's own calls, beside those that it passes on to an engine."""

    async def workers(self) -> dict[str, str]:
        """URL -> id of the engines that it sends requests to."""
        answer = await self._request("GET", "/workers", None)
        with well_formed():
            return {worker["url"]: worker["id"] for worker in answer["workers"]}

    async def add_worker(self, url: str, key: str | None) -> None:
        """Takes effect a moment later."""
        await self._post("/workers", {"url": url} | ({} if key is None else {"api_key": key}))

    async def remove_worker(self, worker_id: str) -> None:
        await self._request("DELETE", f"/workers/{worker_id}", None)


class RoutedFleet(Fleet):
    """A Fleet whose router chooses. The router is the one member to send to; the engines are only watched."""

    def __init__(self, clients: Sequence[EngineClient], router: RouterClient, config: RolloutConfig, *,
                 key: str | None):
        super().__init__(clients, config)
        self._router, self._key = router, key
        self._front = Member(router, reachable=False)

    async def close(self) -> None:
        await super().close()
        await self._router.close()

    def describe(self) -> str:
        return f"router {self._front.describe(None)}; {super().describe()}"

    def updating(self, version: int, urls: Sequence[str]) -> None:
        super().updating(version, urls)
        self._front.updating = True

    def published(self, version: int, urls: Sequence[str], failures: dict[str, str]) -> None:
        super().published(version, urls, failures)
        self._front.updating = False
        if failures and self._front.reachable:
            self._front.lost()
            self._front.found()

    def _ready(self) -> list[Member]:
        """The router, if it answers and some engine serves."""
        return [self._front] if self._front.free and super()._ready() else []

    async def _abort(self, member: Member, rid: str, request: asyncio.Task) -> None:
        await _tried(each.client.abort(rid) for each in self._members if each.reachable)
        await asyncio.wait({request}, timeout=ABORT_GRACE_S)

    async def _look_around(self) -> None:
        await super()._look_around()
        serving = {member.client.base_url for member in self._members
                   if member.reachable and member.version == self._version}
        began = time.monotonic()
        try:
            known = await self._router.workers()
        except EngineHTTPError as error:
            self._front.last_failure = str(error)
            self._front.lost()
            return
        # what it refuses, for example to register an engine twice, is tried again at the next look
        await _tried([*(self._router.add_worker(url, self._key) for url in serving - known.keys()),
                      *(self._router.remove_worker(known[url]) for url in known.keys() - serving)])
        if not self._front.heard(began):
            return
        if not serving & known.keys():
            self._front.lost()
        elif not self._front.reachable:
            self._front.found()


async def _tried(calls: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Runs all at once. If an engine or the router refuses, nothing further happens."""
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(answer, BaseException) and not isinstance(answer, EngineHTTPError):
            raise answer
