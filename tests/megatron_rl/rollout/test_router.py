"""sglang-router in front of engines: only those that serve get requests; a failed publish is made good."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from aiohttp import web

from megatron_rl.config.rollout import ENGINE_KEY, EngineConfig
from megatron_rl.config.schema import Config
from megatron_rl.orchestrator.serving import build_fleet
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.router import RoutedFleet, RouterClient, router_process
from tests.megatron_rl.rollout.test_fleet import CONFIG, Engine, ask, publish, until

HERE = importlib.util.find_spec("sglang_router") is not None
installed = pytest.mark.skipif(not HERE, reason="sglang-router is not installed")
KEY = os.environ[ENGINE_KEY]
WATCHED = replace(CONFIG, engine=replace(CONFIG.engine, router_policy="round_robin", health_interval_s=0.2))


class RegisteredEngine(Engine):
    """Answers what the router asks before it registers an engine."""

    def add_routes(self, app: web.Application) -> None:
        super().add_routes(app)
        app.router.add_get("/health", self._info)
        app.router.add_get("/server_info", self._server_info)

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"tp_size": 1, "model_path": "model", "served_model_name": "model"})


@pytest.fixture(scope="module")
def router(tmp_path_factory) -> Iterator[EngineProcess]:
    engine = replace(WATCHED.engine, start_timeout_s=240.0)
    with router_process(engine, tmp_path_factory.mktemp("router") / "router.log", []) as process:
        yield process


def with_routed_fleet(router: EngineProcess, engines: list[Engine], use: Callable[[RoutedFleet], Awaitable[None]]):
    async def run():
        async with AsyncExitStack() as stack:
            for engine in engines:
                await stack.enter_async_context(engine.serving())
            client = await stack.enter_async_context(RouterClient(router.base_url, api_key=KEY))
            fleet = RoutedFleet([RouterClient(engine.url) for engine in engines], client, WATCHED, key=None)
            await fleet.start()
            try:
                await use(fleet)
            finally:
                for worker in (await client.workers()).values():
                    await client.remove_worker(worker)
                await fleet.close()

    asyncio.run(run())


async def registered(router: EngineProcess, *engines: Engine) -> None:
    async with RouterClient(router.base_url, api_key=KEY) as client, asyncio.timeout(60.0):
        while (await client.workers()).keys() != {engine.url for engine in engines}:
            await asyncio.sleep(0.1)


@installed
@pytest.mark.slow
def test_the_router_sends_requests_to_the_engines_that_serve(router):
    first, second = RegisteredEngine(0), RegisteredEngine(0)

    async def use(fleet: RoutedFleet) -> None:
        publish(fleet, 0, first, second)
        await registered(router, first, second)
        await asyncio.gather(*(ask(fleet, f"r{i}") for i in range(8)))
        assert len(first.seen) == len(second.seen) == 4
        publish(fleet, 0, first, failed=(second,))  # second must catch up
        await registered(router, first)
        await asyncio.gather(*(ask(fleet, f"s{i}") for i in range(4)))
        assert len(second.seen) == 4 and len(first.seen) == 8
        publish(fleet, 0, second)
        await registered(router, first, second)
        await asyncio.gather(*(ask(fleet, f"t{i}") for i in range(4)))
        assert len(second.seen) == 6

    with_routed_fleet(router, [first, second], use)


@installed
@pytest.mark.slow
def test_what_was_under_way_when_an_engine_failed_a_publish_is_asked_again_and_aborted_everywhere(router):
    held, first = asyncio.Event(), RegisteredEngine(0)
    second = RegisteredEngine(0, behave=held.wait)

    async def use(fleet: RoutedFleet) -> None:
        publish(fleet, 0, first, second)
        await registered(router, first, second)
        requests = [asyncio.create_task(ask(fleet, f"r{i}")) for i in range(2)]
        await until(lambda: len(second.seen) == 1 and requests[0].done() != requests[1].done())
        first.version = first.label = 1
        publish(fleet, 1, first, failed=(second,))
        await asyncio.wait_for(asyncio.gather(*requests), 60.0)
        (rid,) = second.seen
        assert rid in first.aborted and first.seen.count(rid.replace("-0.", "-1.")) == 1
        held.set()

    with_routed_fleet(router, [first, second], use)


def test_what_the_router_said_before_a_request_found_it_gone_says_nothing_of_it_afterwards():
    engine = Engine(0)

    async def look() -> None:
        async with engine.serving(), RouterClient("http://127.0.0.1:1") as client:
            fleet = RoutedFleet([RouterClient(engine.url)], client, WATCHED, key=None)

            async def answers_late() -> dict[str, str]:
                fleet._front.lost()
                fleet._front.unanswered_since = time.monotonic()
                return {engine.url: "id"}

            async def answers() -> dict[str, str]:
                return {engine.url: "id"}

            client.workers = answers_late
            publish(fleet, 0, engine)
            await fleet._look_around()
            assert not fleet._front.reachable
            client.workers = answers
            await fleet._look_around()
            assert fleet._front.reachable
            await fleet._members[0].client.close()

    asyncio.run(look())


def test_a_router_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"rollout\.engine\.router=local needs the package sglang-router"):
        router_process(EngineConfig(), tmp_path / "router.log", [])


def test_a_local_router_needs_engines_that_are_started_with_it():
    with pytest.raises(ValueError, match=r"rollout\.engine\.router=local is started with the engines"):
        build_fleet(Config(rollout=replace(CONFIG, engine=EngineConfig(urls=("http://127.0.0.1:1",), router="local"))))
