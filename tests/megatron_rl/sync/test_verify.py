"""An engine whose checksums cannot be predicted is used unproven, unless proof is asked for.

That one on a CPU proves each publish without being asked for is seen in real runs (tests/engine/test_runs.py).
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_rl.config.load import load
from megatron_rl.orchestrator.weights import PublishedWeights
from megatron_rl.sync.verify import UnpredictableChecksumsError


class GPUEngine:
    """The answers of an engine that cannot run here."""

    base_url = "http://engine"

    async def server_info(self) -> dict[str, str]:
        return {"device": "cuda"}

    async def checksums(self) -> list[dict[str, str]]:
        return [{"model.norm.weight": ""}]

    async def input_logprobs(self, tokens, rid) -> np.ndarray:
        return np.zeros(len(tokens) - 1)

    async def continue_generation(self) -> None:
        pass


class Trainer:
    """Answers a publish as the trainer does; `hashed` says of each whether it was to hash what it sent."""

    def __init__(self):
        self.hashed: list[bool] = []

    async def execute(self, kind: str, *, version: int, urls: list[str], checksums: bool) -> dict:
        self.hashed.append(checksums)
        return {"failures": {}, "bytes": 16, "digests": {"model.norm.weight": "00"} if checksums else None,
                "reference": [0.0, 0.0], "free_bytes": {}}


def weights(trainer: Trainer, *overrides: str) -> PublishedWeights:
    engine = GPUEngine()
    fleet = SimpleNamespace(answering=lambda: [engine.base_url], client=lambda url: engine,
                            updating=lambda *_: None, published=lambda *_: None)
    made = PublishedWeights(load(["run.dir=unused", "model.path=unused", *overrides]), trainer, fleet)
    made.probe_tokens = [1, 2, 3]
    return made


def test_an_engine_that_cannot_be_predicted_is_used_unproven_and_says_so():
    trainer = Trainer()
    gpu = weights(trainer)
    for version in (1, 2):
        asyncio.run(gpu.publish(version))
        assert gpu.metrics["sync/engines_verified"] == 0
    assert trainer.hashed == [True, False]  # what it sends next is not hashed in vain


def test_who_asks_for_proof_gets_it_or_an_error():
    with pytest.raises(UnpredictableChecksumsError, match="runs on cuda.*rollout.verify_checksums=null"):
        asyncio.run(weights(Trainer(), "rollout.verify_checksums=true").publish(1))
