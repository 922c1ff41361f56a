"""A server that answers as SGLang 0.5.23 does and computes nothing: `with StubEngine(vocabulary) as engine:`.

For what is tested around engines, not in them. A response depends on its request's seed and on the version of the
weights alone. It takes weights by rollout.publish=disk, and cannot prove what it holds (rollout.verify_checksums=null).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from aiohttp import web

from megatron_rl.config.rollout import ENGINE_KEY
from megatron_rl.rollout.ports import choose_port

ENDLESS = ("/pause_generation", "/continue_generation", "/begin_weight_update", "/end_weight_update", "/flush_cache",
           "/abort_request", "/release_memory_occupation", "/resume_memory_occupation")


class StubEngine:
    """vocabulary: number of token ids. latency_s: of each response.

    spoil: what it answers instead, given the request, its body and the answer; None: the answer.
    """

    spoil: Callable[[web.Request, dict[str, Any], dict[str, Any]], Awaitable[web.StreamResponse | None]] | None = None

    def __init__(self, vocabulary: int, latency_s: float = 0.01):
        self._vocabulary, self._latency_s, self.label = vocabulary, latency_s, -1
        self.port = choose_port(None)
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> StubEngine:
        os.environ.setdefault(ENGINE_KEY, "unused")  # without a key nobody would ask it anything
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        self._going = asyncio.Event()
        self._going.set()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/model_info", self._info)
        app.router.add_get("/server_info", self._server)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_post("/weights_checker", self._checksums)
        app.router.add_post("/update_weights_from_disk", self._load)
        for path in ENDLESS:
            app.router.add_post(path, self._obey)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(self.label)})

    async def _server(self, _: web.Request) -> web.Response:
        return web.json_response({"device": "stub", "tp_size": 1})

    async def _loads(self, _: web.Request) -> web.Response:
        return web.json_response({"loads": [{"num_waiting_reqs": 0}]})

    async def _detokenize(self, request: web.Request) -> web.Response:
        tokens = (await request.json())["tokens"]
        return web.json_response({"text": ["".join(f"<{token}>" for token in each) for each in tokens]})

    async def _checksums(self, _: web.Request) -> web.Response:
        return web.json_response({"ranks": [{"checksums": {}}]})

    async def _load(self, request: web.Request) -> web.Response:
        self.label = int((await request.json())["weight_version"])
        return web.json_response({"success": True})

    async def _obey(self, request: web.Request) -> web.Response:
        if request.path == "/pause_generation":
            self._going.clear()
        if request.path == "/continue_generation":
            self._going.set()
        return web.json_response({})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        await asyncio.sleep(self._latency_s)
        await self._going.wait()
        answer = self._answer(body)
        if self.spoil is not None and (spoiled := await self.spoil(request, body, answer)) is not None:
            return spoiled
        return web.json_response(answer)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling, prompt = body["sampling_params"], body["input_ids"]
        rng = np.random.default_rng([sampling.get("sampling_seed", 0), len(prompt), self.label + 1])
        count = int(rng.integers(1, sampling["max_new_tokens"] + 1))
        tokens = rng.integers(0, self._vocabulary, count).tolist()
        meta = {"id": body["rid"], "cached_tokens": 0, "num_retractions": 0,
                "output_token_logprobs": [[-4.0, token, None] for token in tokens],
                "input_token_logprobs": [[None, prompt[0], None], *([-4.0, token, None] for token in prompt[1:])],
                "weight_versions": [{"version": str(self.label), "start": 0, "end": count}],
                "finish_reason": {"type": "length" if count == sampling["max_new_tokens"] else "stop"}}
        return {"output_ids": tokens, "meta_info": meta}
