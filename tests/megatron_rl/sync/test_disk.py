"""Weights through a folder: what is said of an engine that does not find them there."""

from __future__ import annotations

import pytest
import torch
from aiohttp import web

from megatron_rl.rollout.client import EngineClient
from megatron_rl.sync.disk import UNSEEN, DiskPublisher
from megatron_rl.sync.publish import PublishError
from tests.stub_engine import StubEngine
from tests.tiny_models import write_tiny_bailing


class Blind(StubEngine):
    async def _load(self, request: web.Request) -> web.Response:
        return web.json_response({"success": False, "message": f"{UNSEEN}: Cannot find any model weights"}, status=400)


def test_the_engines_own_words_follow_the_advice(tmp_path):
    model = write_tiny_bailing(tmp_path / "model")
    with Blind(32) as engine:
        publisher = DiskPublisher([EngineClient(f"http://127.0.0.1:{engine.port}")], bucket_bytes=1 << 20,
                                  folder=tmp_path / "published", config_folder=model)
        with pytest.raises(PublishError, match="needs a run.dir that the engine's machine shares.*Cannot find any"):
            publisher.publish([("weight", torch.zeros(2))], 3)
