"""Sends new weights to the engines: through shared memory or a folder; broadcast.py has the third way.

Runs on trainer rank 0 and knows nothing of Megatron: it takes (checkpoint name, tensor) pairs as they come
and holds one bucket at a time. Every publisher pauses the engines (running requests go back to the queue and
recompute their key-value cache), updates, flushes the prefix cache, has each engine checked, and resumes those
that passed. An engine that fails stays paused with unknown weights; the others go on without it, and the report
names it. The next publish to it starts over, wherever it had stopped.
Written for SGLang 0.5.23 (sglang/srt/managers/scheduler_components/weight_updater.py).
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.multiprocessing
from safetensors.torch import save_file

from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.signals import stop_unheard
from megatron_rl.sync.buckets import FLATTENED_BUCKET, Bucket, NamedTensor, bucket_metadata, make_buckets
from megatron_rl.sync.memory import EngineMemory
from megatron_rl.sync.verify import WeightMismatchError

Check = Callable[[EngineClient], Coroutine[Any, Any, None]]


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
                check: Check | None = None) -> PublishReport:
        """Makes the engines serve these weights as `version`, which must grow (ValueError otherwise).

        only: URLs of the engines that get them; with it, the version that was published last may be sent again.
        check: called for each engine once all tensors have arrived, before it resumes; raises PublishError or
        WeightMismatchError when something is wrong with it. PublishError, or what the last check raised, when no
        engine is left.
        """
        ...

    def close(self) -> None: ...


class EnginePublisher:
    """What all publishers share: versions, pausing and resuming, engines that drop out, and the report.

    memory: of engines that share the trainer's GPUs, which get it back before the weights arrive.
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
                check: Check | None = None) -> PublishReport:
        if self._version is not None and (version < self._version or (version == self._version and only is None)):
            raise ValueError(f"weight version {version} does not follow {self._version}: versions must grow")
        start = time.perf_counter()
        self._active = [client for client in self._clients if only is None or client.base_url in only]
        self._failures = {}
        try:
            tensors, num_bytes, buckets = self._run(self._publish(named_tensors, version, check))
        finally:
            self._buffer = None
        self._version = version
        return PublishReport(version, tensors, num_bytes, buckets, time.perf_counter() - start, dict(self._failures))

    def close(self) -> None:
        """Nothing is held between publishes, unless a subclass says so."""

    def _flatten(self, bucket: Bucket) -> torch.Tensor:
        """The bucket in the publish's one buffer: new memory for each would cost more than the copy (page faults).

        It has room for any bucket, unless none is to come: making memory shared touches all of it.
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

    async def _on_all(self, where: str, call: Check) -> None:
        """One call to every engine that is still in; waits for all answers. Raises when none is left."""
        clients = tuple(self._active)
        answers = await asyncio.gather(*(call(client) for client in clients), return_exceptions=True)
        for client, answer in zip(clients, answers, strict=True):
            if isinstance(answer, EngineHTTPError | PublishError | WeightMismatchError):
                self._failures[client.base_url] = f"{where}: {answer}; the engine stays paused"
                self._active.remove(client)
                failure = answer
            elif isinstance(answer, BaseException):
                raise answer
        if not self._active:
            if isinstance(failure, WeightMismatchError):
                raise failure
            raise PublishError("; ".join(self._failures.values())) from failure

    async def _publish(self, named_tensors: Iterable[NamedTensor], version: int,
                       check: Check | None) -> tuple[int, int, int]:
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
        if check is not None:
            await self._on_all(f"{what}: check", check)
        await self._on_all(f"{what}: continue", lambda client: client.continue_generation())
        return tensors, num_bytes, buckets

    async def _prepare(self, what: str) -> None:
        """Before the engines are paused."""

    async def _begin(self, what: str) -> None:
        await self._on_all(f"{what}: begin", _begin_afresh)

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        """Loads one bucket into every engine; the last one carries the version."""
        raise NotImplementedError

    async def _finish(self, version: int, what: str) -> None:
        await self._on_all(f"{what}: end", lambda client: client.end_weight_update())


async def _begin_afresh(client: EngineClient) -> None:
    """An update that was begun and never ended, by us or by a trainer that died, is ended first."""
    try:
        await client.begin_weight_update()
    except EngineHTTPError:
        await client.end_weight_update()
        await client.begin_weight_update()


class TensorPublisher(EnginePublisher):
    """Buckets in shared memory of this machine; only their address travels over HTTP."""

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


class DiskPublisher(EnginePublisher):
    """Writes a Hugging Face folder `folder/version_N` that engine and trainer both see, and has it loaded.

    config_folder: where config.json, the configuration file and the tokenizer are copied from. The folder
    appears under its name only when it is whole; the version before it is removed after a success.
    """

    def __init__(
        self, clients: Sequence[EngineClient], *, bucket_bytes: int, folder: str | Path, config_folder: str | Path,
        memory: EngineMemory | None = None,
    ):
        super().__init__(clients, bucket_bytes=bucket_bytes, memory=memory)
        self._folder = Path(folder).resolve()
        self._config_folder = Path(config_folder)
        self._weight_map: dict[str, str] = {}

    def _unfinished(self, version: int) -> Path:
        return self._folder / f".version_{version}.unfinished"

    async def _begin(self, what: str) -> None:
        self._weight_map = {}

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        folder = self._unfinished(version)
        if bucket.index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        shard = f"model-{bucket.index + 1:05d}.safetensors"
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in bucket.tensors}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, shard)

    async def _finish(self, version: int, what: str) -> None:
        unfinished, finished = self._unfinished(version), self._folder / f"version_{version}"
        for file in self._config_folder.iterdir():
            if file.suffix in (".json", ".py", ".jinja", ".model", ".txt") and "index" not in file.name:
                shutil.copy(file, unfinished / file.name)
        index = {"metadata": {}, "weight_map": self._weight_map}
        (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        if finished.exists():
            shutil.rmtree(finished)
        unfinished.rename(finished)
        await self._on_all(f"{what}: loading {finished}",
                           lambda client: client.update_weights_from_disk(str(finished), version=version))
        for other in self._folder.glob("version_*"):
            if other != finished:
                shutil.rmtree(other)


@contextmanager
def _named_shared_memory() -> Iterator[None]:
    """Inside, tensors are shared by name, which an unrelated process can open.

    torch starts a process that keeps them, without which the publish before the last save would fail.
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
