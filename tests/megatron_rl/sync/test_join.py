"""An engine that does not join the broadcast group is named, and soon; over HTTP, with servers that answer as told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from aiohttp import web

from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.engines import choose_port
from megatron_rl.sync.broadcast import BroadcastPublisher
from megatron_rl.sync.publish import PublishError

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


async def refuse() -> web.Response:
    return web.json_response({"message": "no such device"}, status=400)


async def hang() -> web.Response:
    await asyncio.sleep(100)
    over.set()
    return web.Response()


@pytest.mark.parametrize("answer, why", [(refuse, "HTTP 400: .*no such device"), (hang, "no answer within 2 s")])
def test_an_engine_that_does_not_join_the_group_is_named(answer, why):
    with engine(answer) as url:
        publisher = BroadcastPublisher([EngineClient(url, control_timeout_s=2.0)], bucket_bytes=1000, backend="gloo",
                                       device="cpu")
        with pytest.raises(PublishError, match=f"publishing version 1: joining the group at .*{url}.*{why}"):
            publisher.publish([("a", torch.zeros(2))], 1)
        assert not over.is_set()
