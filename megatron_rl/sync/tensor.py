"""Sends weights through the shared memory of this machine."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

from megatron_rl.rollout.client import EngineClient
from megatron_rl.signals import stop_unheard
from megatron_rl.sync.buckets import FLATTENED_BUCKET, Bucket, bucket_metadata
from megatron_rl.sync.memory import EngineMemory
from megatron_rl.sync.publish import EnginePublisher


class TensorPublisher(EnginePublisher):
    """Puts buckets into shared memory of this machine. Only their address travels over HTTP."""

    def __init__(self, clients: Sequence[EngineClient], *, bucket_bytes: int, memory: EngineMemory | None = None):
        super().__init__(clients, bucket_bytes=bucket_bytes, memory=memory)
        self._tp_sizes: dict[EngineClient, int] = {}

    async def _prepare(self, what: str) -> None:
        async def ask(client: EngineClient) -> None:
            self._tp_sizes[client] = (await client.server_info())["tp_size"]

        await self._on_all(f"{what}: server_info", ask)

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        flat = self._flatten(bucket)
        metadata = bucket_metadata(bucket)

        async def send(client: EngineClient) -> None:
            # One pickle per receiving rank: each counts as one reader of the shared memory.
            with _named_shared_memory():
                payloads = [_pickled({"flattened_tensor": flat, "metadata": metadata})
                            for _ in range(self._tp_sizes[client])]
            await client.update_weights_from_tensor(
                payloads, load_format=FLATTENED_BUCKET, flush_cache=False, version=version if bucket.last else None)

        await self._on_all(where, send)

    def _new_buffer(self, num_bytes: int) -> torch.Tensor:
        with _named_shared_memory():
            return torch.empty(num_bytes, dtype=torch.uint8).share_memory_()


@contextmanager
def _named_shared_memory() -> Iterator[None]:
    """Inside, torch shares tensors by name, which an unrelated process can open.

    torch starts a process that keeps them. Without it the publish before the last save would fail.
    """
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        with stop_unheard():
            yield
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


def _pickled(payload: object) -> str:
    """A base64 pickle that holds the addresses of shared tensors."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(payload)
    return base64.b64encode(buffer.getvalue()).decode()
