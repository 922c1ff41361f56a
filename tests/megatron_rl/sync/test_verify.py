"""An engine whose checksums cannot be predicted is used unproven, unless proof is asked for.

That one on a CPU proves each publish without being asked for is seen in real runs (tests/engine/test_runs.py).
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_rl.config.load import load
from megatron_rl.recipes.weights import Channel
from megatron_rl.sync.verify import ExpectedChecksums, UnpredictableChecksumsError

TENSOR = ("model.norm.weight", torch.arange(4.0))


class GPUEngine:
    """The answers to the publisher of an engine that cannot run here."""

    base_url = "http://engine"

    async def server_info(self) -> dict[str, str]:
        return {"device": "cuda"}

    async def checksums(self) -> list[dict[str, str]]:
        return [{"model.norm.weight": ""}]

    async def input_logprobs(self, tokens, rid) -> np.ndarray:
        return np.zeros(len(tokens) - 1)

    async def close(self) -> None:
        pass


class Publisher:
    """Takes all tensors and lets the channel check its engine."""

    def __init__(self, engine: GPUEngine):
        self._engine = engine

    def publish(self, tensors, version, *, only, check) -> SimpleNamespace:
        sent = sum(tensor.nbytes for _, tensor in tensors)
        asyncio.run(check(self._engine))
        return SimpleNamespace(failures={}, bytes=sent)


def channel(*overrides: str) -> Channel:
    engine = GPUEngine()
    fleet = SimpleNamespace(answering=lambda: [engine.base_url], updating=None, published=None)
    serving = SimpleNamespace(fleet=fleet, tell=lambda *_: None)
    return Channel(load(["run.dir=unused", "model.path=unused", *overrides]), {}, serving, [engine],
                   Publisher(engine), probe_tokens=[1, 2, 3])


def send(through: Channel, version: int) -> int:
    assert through.send(iter([TENSOR]), version, None, np.zeros(2), last=True)
    return through.metrics["sync/engines_verified"]


def test_an_engine_that_cannot_be_predicted_is_used_unproven_and_says_so(monkeypatch):
    gpu = channel()
    assert send(gpu, 1) == 0
    monkeypatch.setattr(ExpectedChecksums, "watch", None)  # what it sends next is not hashed in vain
    assert send(gpu, 2) == 0


def test_who_asks_for_proof_gets_it_or_an_error():
    with pytest.raises(UnpredictableChecksumsError, match="runs on cuda.*rollout.verify_checksums=null"):
        send(channel("rollout.verify_checksums=true"), 1)
