"""Sends adapters alone. The engines keep the weights of model.path, and compute with the new matrices beside them.

Every send loads an adapter under a name of its own (sglang/srt/managers/tokenizer_control_mixin.py:
load_lora_adapter_from_tensors), which each request must name. Written for SGLang 0.5.23, started with --enable-lora.
"""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_rl.rollout.client import EngineClient
from megatron_rl.sync.buckets import Bucket
from megatron_rl.sync.publish import EnginePublisher

PREFIX = "megatron_rl-"
"""Begins the names of our adapters. An engine serves one run, so all others of this beginning are of earlier sends."""


class AdapterPublisher(EnginePublisher):
    """Sends all matrices, under peft's names, in one HTTP request. name: of the adapter that was sent last.

    config: adapter_config.json as peft has it. An engine that received a matrix with another SHA-256 ends.
    """

    def __init__(self, clients: Sequence[EngineClient], *, config: Mapping[str, Any]):
        super().__init__(clients, bucket_bytes=sys.maxsize)
        self._config = config
        self.name = ""

    async def _prepare(self, what: str) -> None:
        self.name = f"{PREFIX}{uuid.uuid4().hex}"

        async def unload(client: EngineClient) -> None:
            for name in await client.adapters():
                if name.startswith(PREFIX):
                    await client.unload_adapter(name)

        # Before the pause, in which a request that still uses one could not end.
        await self._on_all(f"{what}: unloading earlier adapters", unload)

    async def _begin(self, what: str) -> None:
        """The weights stay as they are."""

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        pickled = _pickled(dict(bucket.tensors))
        checksums = {name: hashlib.sha256(memoryview(matrix.flatten().view(torch.uint8).numpy())).hexdigest()
                     for name, matrix in bucket.tensors}

        async def load(client: EngineClient) -> None:
            await client.load_adapter(self.name, self._config, pickled, checksums, version=version)

        await self._on_all(where, load)

    async def _finish(self, version: int, what: str) -> None:
        """Nothing was begun."""


def _pickled(tensors: Mapping[str, torch.Tensor]) -> str:
    """A base64 pickle that SGLang's unpickler accepts (srt/utils/common.py: SafeUnpickler).

    It knows the contents of tensors by torch's function alone, and Megatron-Core has put another in its place.
    """
    others = torch.storage._load_from_bytes
    torch.storage._load_from_bytes = _load_from_bytes
    try:
        return base64.b64encode(pickle.dumps(dict(tensors))).decode()
    finally:
        torch.storage._load_from_bytes = others


def _load_from_bytes(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


_load_from_bytes.__module__ = "torch.storage"
