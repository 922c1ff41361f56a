"""An engine that does not join the broadcast group is named, and soon; over HTTP, with servers that answer as told."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
import torch
from aiohttp import web

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.config.schema import Config
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.ports import choose_port
from megatron_rl.sync.broadcast import BroadcastPublisher
from megatron_rl.sync.publish import PublishError
from megatron_rl.trainer.sender import build_publisher

over = threading.Event()
"""Set when an engine that hangs has answered after all."""


@contextmanager
def engine(answer) -> Iterator[str]:
    """An engine of one rank whose answer to being asked to join is `answer()`; its URL."""
    url, loop = f"http://127.0.0.1:{choose_port(None)}", asyncio.new_event_loop()

    async def join(request: web.Request) -> web.Response:
        return await answer()

    async def info(request: web.Request) -> web.Response:
        return web.json_response({"tp_size": 1})

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/server_info", info)
        app.router.add_post("/init_weights_update_group", join)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(url.rsplit(":", 1)[1])).start()
        return runner

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield url
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def own_address() -> str:
    """An address of this machine other than loopback."""
    found = [each.address for name in psutil.net_if_addrs().values() for each in name
             if each.family is socket.AF_INET and not each.address.startswith("127.")]
    if not found:
        pytest.skip("this machine has no address but loopback")
    return found[0]


@pytest.mark.parametrize("here_too", [False, True])
def test_engines_elsewhere_are_told_an_address_that_they_can_reach(here_too, monkeypatch):
    """Whatever the ranks call the first of them among themselves."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    config = RolloutConfig(publish="broadcast")
    clients = [EngineClient(f"http://{host}:2000") for host in ["127.0.0.1"] * here_too + [own_address()]]
    publisher = build_publisher(Config(rollout=config), clients, torch.device("cpu"))
    assert publisher._master_address == own_address()
    assert build_publisher(Config(rollout=config), clients[:here_too] or [EngineClient("http://localhost:2000")],
                           torch.device("cpu"))._master_address == "127.0.0.1"


async def refuse() -> web.Response:
    return web.json_response({"message": "no such device"}, status=400)


async def hang() -> web.Response:
    await asyncio.sleep(100)
    over.set()
    return web.Response()


@pytest.mark.parametrize("answer, limit_s, why", [
    (refuse, 10.0, "HTTP 400: .*no such device"), (hang, 2.0, "no answer within 2 s")])
def test_an_engine_that_does_not_join_the_group_is_named(answer, limit_s, why):
    with engine(answer) as url:
        publisher = BroadcastPublisher([EngineClient(url, control_timeout_s=limit_s)], bucket_bytes=1000,
                                       backend="gloo", device="cpu")
        with pytest.raises(PublishError, match=f"publishing version 1: joining the group at .*{url}.*{why}"):
            publisher.publish([("a", torch.zeros(2))], 1)
        assert not over.is_set()
