"""Which engines must prove what they hold: those whose checksums can be predicted, or all when the user says so."""

from __future__ import annotations

import asyncio
import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_rl.config.load import load
from megatron_rl.recipes.weights import Channel
from megatron_rl.sync.verify import ExpectedChecksums, UnpredictableChecksumsError

TENSOR = ("model.norm.weight", torch.arange(4.0))


class Engine:
    """A GPU's engine, which nobody has here, or a CPU's; its answers to the publisher."""

    base_url = "http://engine"

    def __init__(self, device: str, digest: str = ""):
        self._device, self._digest = device, digest

    async def server_info(self) -> dict[str, str]:
        return {"device": self._device}

    async def checksums(self) -> list[dict[str, str]]:
        return [{"model.norm.weight": self._digest}]

    async def input_logprobs(self, tokens, rid) -> np.ndarray:
        return np.zeros(len(tokens) - 1)

    async def close(self) -> None:
        pass


class Publisher:
    """Takes all tensors and lets the channel check its engine."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def publish(self, tensors, version, *, only, check) -> SimpleNamespace:
        sent = sum(tensor.nbytes for _, tensor in tensors)
        asyncio.run(check(self._engine))
        return SimpleNamespace(failures={}, bytes=sent)


def channel_to(engine: Engine, *overrides: str) -> Channel:
    fleet = SimpleNamespace(answering=lambda: [engine.base_url], updating=None, published=None)
    serving = SimpleNamespace(fleet=fleet, tell=lambda *_: None)
    return Channel(load(["run.dir=unused", "model.path=unused", *overrides]), {}, serving, [engine],
                   Publisher(engine), probe_tokens=[1, 2, 3])


def send(channel: Channel, version: int) -> int:
    assert channel.send(iter([TENSOR]), version, None, np.zeros(2), last=True)
    return channel.metrics["sync/engines_verified"]


def test_an_engine_that_cannot_be_predicted_is_used_unproven_and_says_so(monkeypatch):
    channel = channel_to(Engine("cuda"))
    assert send(channel, 1) == 0
    monkeypatch.setattr(ExpectedChecksums, "watch", None)  # what it sends next is not hashed in vain
    assert send(channel, 2) == 0


def test_who_asks_for_proof_gets_it_or_an_error():
    with pytest.raises(UnpredictableChecksumsError, match="runs on cuda.*rollout.verify_checksums=null"):
        send(channel_to(Engine("cuda"), "rollout.verify_checksums=true"), 1)


def test_an_engine_on_cpu_proves_what_it_holds():
    digest = hashlib.sha256(np.arange(4, dtype=np.float32).tobytes()).hexdigest()[:16]
    assert send(channel_to(Engine("cpu", digest)), 1) == 1
