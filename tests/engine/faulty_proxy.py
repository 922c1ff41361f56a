"""An HTTP server in front of an engine that passes everything on, but for requests it was told to spoil or to hold."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import aiohttp
from aiohttp import web

from megatron_rl.rollout.ports import choose_port


class FaultyProxy:
    """`with FaultyProxy(url) as proxy:` listens on proxy.url. arm(kind, count) spoils the next `count` generations.

    kinds: error (HTTP 500), garbage (not JSON), cut (the connection ends in the middle of the answer), full (the
    engine's answer when its queue is full). Generations wait for as long as hold() is true: a run can then be killed at
    one point, however fast it is.
    """

    def __init__(self, target: str, hold: Callable[[], bool] = lambda: False):
        self._target, self._hold = target, hold
        self._kind, self._left = "", 0
        self.spoiled = 0
        self.port = choose_port(None)
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def arm(self, kind: str, count: int) -> None:
        self._kind, self._left = kind, count

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._session = aiohttp.ClientSession()
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _stop(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        while request.path == "/generate" and self._hold():
            await asyncio.sleep(0.05)
        spoil = request.path == "/generate" and self._left > 0
        if spoil:
            self._left -= 1
            self.spoiled += 1
            if self._kind == "error":
                return web.json_response({"error": {"message": "internal error"}}, status=500)
            if self._kind == "full":
                return web.json_response({"error": {"message": "The request queue is full."}}, status=503)
            if self._kind == "garbage":
                return web.Response(text='{"output_ids": [1, 2', content_type="application/json")
        key = {name: request.headers[name] for name in ("Authorization",) if name in request.headers}
        async with self._session.request(request.method, self._target + request.path_qs, data=body,
                                         headers={"Content-Type": "application/json", **key}) as answer:
            content = await answer.read()
            if not spoil:
                return web.Response(body=content, status=answer.status, content_type=answer.content_type)
        response = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
        request.transport.abort()
        return response
