"""What all transports of new weights share; tensor.py, broadcast.py and disk.py are the transports.

It runs on trainer rank 0 and knows nothing of Megatron. It takes (checkpoint name, tensor) pairs as they come and holds
one bucket at a time. Every publisher pauses the engines (running requests go back to the queue and recompute their
key-value cache), updates them, flushes the prefix cache, and resumes them unless the caller checks them first. An
engine that fails stays paused with unknown weights. The others go on without it, and the report names it. The next
publish to it starts over, wherever the failed one stopped. Written for SGLang 0.5.23
(sglang/srt/managers/scheduler_components/weight_updater.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.sync.buckets import Bucket, NamedTensor, make_buckets
from megatron_rl.sync.memory import EngineMemory

Call = Callable[[EngineClient], Coroutine[Any, Any, None]]


class PublishError(RuntimeError):
    """A publish failed at every engine: names version, bucket and engine. They stay paused."""


@dataclass(frozen=True)
class PublishReport:
    """failures: engine -> why it did not get the weights."""

    version: int
    tensors: int
    bytes: int
    buckets: int
    seconds: float
    failures: Mapping[str, str] = field(default_factory=dict)


class Publisher(Protocol):
    def publish(self, named_tensors: Iterable[NamedTensor], version: int, *, only: Sequence[str] | None = None,
                resume: bool = True) -> PublishReport:
        """Has the engines serve these weights as `version`, which must grow (ValueError otherwise).

        only: URLs of the engines that get the weights; with it, the last published version may be sent again. resume:
        whether the engines go on by themselves. Otherwise they stay paused, with the new weights, until somebody has
        checked them. PublishError if no engine is left.
        """
        ...

    def close(self) -> None: ...


class EnginePublisher:
    """What all publishers share: versions, pausing and resuming, engines that drop out, and the report.

    memory: given if engines share the trainer's GPUs; they get their memory back before the weights arrive.
    """

    def __init__(self, clients: Sequence[EngineClient], *, bucket_bytes: int, memory: EngineMemory | None = None):
        if not clients:
            raise ValueError("rollout.engine.urls is empty: a publisher needs at least one engine")
        self._clients = tuple(clients)
        self._bucket_bytes = bucket_bytes
        self._memory = memory
        self._version: int | None = None
        self._active: list[EngineClient] = []
        self._failures: dict[str, str] = {}
        self._buffer: torch.Tensor | None = None

    def publish(self, named_tensors: Iterable[NamedTensor], version: int, *, only: Sequence[str] | None = None,
                resume: bool = True) -> PublishReport:
        if self._version is not None and (version < self._version or (version == self._version and only is None)):
            raise ValueError(f"weight version {version} does not follow {self._version}: versions must grow")
        start = time.perf_counter()
        self._active = [client for client in self._clients if only is None or client.base_url in only]
        self._failures = {}
        try:
            tensors, num_bytes, buckets = self._run(self._publish(named_tensors, version, resume))
        finally:
            self._buffer = None
        self._version = version
        return PublishReport(version, tensors, num_bytes, buckets, time.perf_counter() - start, dict(self._failures))

    def close(self) -> None:
        """By default nothing is held between publishes."""

    def _flatten(self, bucket: Bucket) -> torch.Tensor:
        """The bucket in the one buffer of this publish.

        New memory for each would cost more than the copy (page faults).
        The buffer has room for any bucket, unless this is the last one: making memory shared touches all of it.
        """
        if self._buffer is None or len(self._buffer) < bucket.num_bytes:
            self._buffer = None
            self._buffer = self._new_buffer(max(bucket.num_bytes, 0 if bucket.last else self._bucket_bytes))
        return bucket.flatten(self._buffer)

    def _new_buffer(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], where the transport wants it."""
        raise NotImplementedError

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        async def run_and_close() -> Any:
            try:
                return await coroutine
            finally:
                await asyncio.gather(*(client.close() for client in self._clients))

        return asyncio.run(run_and_close())

    async def _on_all(self, where: str, call: Call) -> None:
        """Makes one call to every engine that is still in, and waits for all answers. Raises if no engine is left."""
        clients = tuple(self._active)
        answers = await asyncio.gather(*(call(client) for client in clients), return_exceptions=True)
        for client, answer in zip(clients, answers, strict=True):
            if isinstance(answer, EngineHTTPError | PublishError):
                self._failures[client.base_url] = f"{where}: {answer}; the engine stays paused"
                self._active.remove(client)
                failure = answer
            elif isinstance(answer, BaseException):
                raise answer
        if not self._active:
            raise PublishError("; ".join(self._failures.values())) from failure

    async def _publish(self, named_tensors: Iterable[NamedTensor], version: int,
                       resume: bool) -> tuple[int, int, int]:
        what = f"publishing version {version}"
        await self._prepare(what)
        await self._on_all(f"{what}: pause", lambda client: client.pause_generation("retract"))
        if self._memory is not None:
            await self._on_all(f"{what}: memory of the weights", self._memory.resume_weights)
        await self._begin(what)
        tensors = num_bytes = buckets = 0
        for bucket in make_buckets(named_tensors, self._bucket_bytes):
            await self._send(bucket, version, f"{what}: {bucket.describe()}")
            tensors += len(bucket.tensors)
            num_bytes += bucket.num_bytes
            buckets += 1
        await self._finish(version, what)
        if self._memory is not None:
            await self._on_all(f"{what}: memory of the cache", self._memory.resume_cache)
        await self._on_all(f"{what}: flush", lambda client: client.flush_cache())
        if resume:
            await self._on_all(f"{what}: continue", lambda client: client.continue_generation())
        return tensors, num_bytes, buckets

    async def _prepare(self, what: str) -> None:
        """Called before the engines are paused."""

    async def _begin(self, what: str) -> None:
        await self._on_all(f"{what}: begin", _begin_afresh)

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        """Loads one bucket into every engine. The last one carries the version."""
        raise NotImplementedError

    async def _finish(self, version: int, what: str) -> None:
        await self._on_all(f"{what}: end", lambda client: client.end_weight_update())


async def _begin_afresh(client: EngineClient) -> None:
    """Begins an update. If one was begun and never ended, by us or by a trainer that died, it is ended first."""
    try:
        await client.begin_weight_update()
    except EngineHTTPError:
        await client.end_weight_update()
        await client.begin_weight_update()
