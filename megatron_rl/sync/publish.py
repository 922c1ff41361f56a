"""Sends new weights to the engines: through shared memory, a broadcast, or a folder.

Runs on trainer rank 0 and knows nothing of Megatron: it takes (checkpoint name, tensor) pairs as they come
and holds one bucket at a time. Every publisher pauses the engines (running requests go back to the queue and
recompute their key-value cache), updates, flushes the prefix cache, and resumes. After a failure the engines
stay paused with unknown weights, and PublishError says where it stopped.
Written for SGLang 0.5.23 (sglang/srt/managers/scheduler_components/weight_updater.py).
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import save_file

from megatron_rl.rollout.client import EngineClient, EngineHTTPError

NamedTensor = tuple[str, torch.Tensor]
POLL_S = 0.001
NO_UPDATE_IS_OPEN = "no weight-update session is open"  # end_weight_update of SGLang's weight_updater.py
# SGLang's FlattenedTensorBucket on the wire (sglang/srt/weight_sync/tensor_bucket.py). Importing it takes
# 7 s, and its unpickler accepts plain namespaces.
FLATTENED_BUCKET = "flattened_bucket"


class PublishError(RuntimeError):
    """A publish failed half-way: names version, bucket and engine. The engines stay paused."""


@dataclass(frozen=True)
class PublishReport:
    version: int
    tensors: int
    bytes: int
    buckets: int
    seconds: float


class Publisher(Protocol):
    def publish(self, named_tensors: Iterable[NamedTensor], version: int) -> PublishReport:
        """Makes the engines serve these weights as `version`, which must grow (ValueError otherwise)."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Bucket:
    """Some consecutive tensors of the model. `last` marks the end of the model."""

    index: int
    tensors: tuple[NamedTensor, ...]
    last: bool

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors)

    def flatten(self) -> torch.Tensor:
        """All tensors end to end, uint8 [num_bytes], on their device."""
        return torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for _, tensor in self.tensors])

    def describe(self) -> str:
        return (f"bucket {self.index} ({self.tensors[0][0]} ... {self.tensors[-1][0]}, "
                f"{len(self.tensors)} tensors, {self.num_bytes} bytes)")


def make_buckets(named_tensors: Iterable[NamedTensor], bucket_bytes: int) -> Iterator[Bucket]:
    """Buckets of at most bucket_bytes, in order; a larger tensor travels alone.

    A tensor that would start at an address its dtype does not divide opens a new bucket.
    """
    held: list[NamedTensor] = []
    held_bytes = 0
    index = 0
    for name, tensor in named_tensors:
        unaligned = held_bytes % tensor.element_size() != 0
        if held and (unaligned or held_bytes + tensor.nbytes > bucket_bytes):
            yield Bucket(index, tuple(held), last=False)
            index, held, held_bytes = index + 1, [], 0
        held.append((name, tensor))
        held_bytes += tensor.nbytes
    if not held:
        raise ValueError("nothing to publish: the export gave no tensors")
    yield Bucket(index, tuple(held), last=True)


class _EnginePublisher:
    """What all publishers share: versions, pausing and resuming, and the report."""

    def __init__(self, clients: Sequence[EngineClient], *, bucket_bytes: int):
        if not clients:
            raise ValueError("rollout.engine.urls is empty: a publisher needs at least one engine")
        self._clients = tuple(clients)
        self._bucket_bytes = bucket_bytes
        self._version: int | None = None

    def publish(self, named_tensors: Iterable[NamedTensor], version: int) -> PublishReport:
        if self._version is not None and version <= self._version:
            raise ValueError(f"weight version {version} does not follow {self._version}: versions must grow")
        start = time.perf_counter()
        tensors, num_bytes, buckets = self._run(self._publish(named_tensors, version))
        self._version = version
        return PublishReport(version, tensors, num_bytes, buckets, time.perf_counter() - start)

    def close(self) -> None:
        """Nothing is held between publishes, unless a subclass says so."""

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        async def run_and_close() -> Any:
            try:
                return await coroutine
            finally:
                await asyncio.gather(*(client.close() for client in self._clients))

        return asyncio.run(run_and_close())

    async def _on_all(self, where: str, call: Callable[[EngineClient], Coroutine[Any, Any, None]]) -> None:
        """One call to every engine at once; waits for all answers, then raises the first failure."""
        answers = await asyncio.gather(*(call(client) for client in self._clients), return_exceptions=True)
        for client, answer in zip(self._clients, answers, strict=True):
            if isinstance(answer, EngineHTTPError):
                log = "" if client.log_path is None else f"; log: {client.log_path}"
                raise PublishError(f"{where}: {answer}{log}; the engines stay paused") from answer
            if isinstance(answer, BaseException):
                raise answer

    async def _publish(self, named_tensors: Iterable[NamedTensor], version: int) -> tuple[int, int, int]:
        what = f"publishing version {version}"
        await self._prepare()
        await self._on_all(f"{what}: pause", lambda client: client.pause_generation("retract"))
        await self._begin(what)
        tensors = num_bytes = buckets = 0
        for bucket in make_buckets(named_tensors, self._bucket_bytes):
            await self._send(bucket, version, f"{what}: {bucket.describe()}")
            tensors += len(bucket.tensors)
            num_bytes += bucket.num_bytes
            buckets += 1
        await self._finish(version, what)
        await self._on_all(f"{what}: flush", lambda client: client.flush_cache())
        await self._on_all(f"{what}: continue", lambda client: client.continue_generation())
        return tensors, num_bytes, buckets

    async def _prepare(self) -> None:
        """Before the engines are paused."""

    async def _begin(self, what: str) -> None:
        if self._version is None:
            await asyncio.gather(*(_end_abandoned_update(client) for client in self._clients))
        await self._on_all(f"{what}: begin", lambda client: client.begin_weight_update())

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        """Loads one bucket into every engine; the last one carries the version."""
        raise NotImplementedError

    async def _finish(self, version: int, what: str) -> None:
        await self._on_all(f"{what}: end", lambda client: client.end_weight_update())


class TensorPublisher(_EnginePublisher):
    """Buckets in shared memory of this machine; only their address travels over HTTP."""

    def __init__(self, clients: Sequence[EngineClient], *, bucket_bytes: int):
        super().__init__(clients, bucket_bytes=bucket_bytes)
        self._tp_sizes: dict[EngineClient, int] = {}

    async def _prepare(self) -> None:
        for client in self._clients:
            if client not in self._tp_sizes:
                self._tp_sizes[client] = (await client.server_info())["tp_size"]

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        flat = bucket.flatten().cpu()
        metadata = _bucket_metadata(bucket)

        async def send(client: EngineClient) -> None:
            # One pickle per receiving rank: each counts as one reader of the shared memory.
            payloads = [_share({"flattened_tensor": flat, "metadata": metadata})
                        for _ in range(self._tp_sizes[client])]
            await client.update_weights_from_tensor(
                payloads, load_format=FLATTENED_BUCKET, flush_cache=False, version=version if bucket.last else None)

        await self._on_all(where, send)


class BroadcastPublisher(_EnginePublisher):
    """Buckets broadcast from this process to every engine rank, over gloo or NCCL.

    The process group is made on the first publish and ended by close(). Tensors are moved to `device`.
    """

    _group_numbers = itertools.count()

    def __init__(
        self, clients: Sequence[EngineClient], *, bucket_bytes: int, backend: Literal["gloo", "nccl"],
        device: torch.device | str, master_address: str = "127.0.0.1", timeout_s: float = 300.0,
    ):
        super().__init__(clients, bucket_bytes=bucket_bytes)
        self._backend = backend
        self._device = torch.device(device)
        self._master_address = master_address
        self._timeout_s = timeout_s
        self._group: dist.ProcessGroup | None = None
        self._group_name = f"megatron_rl_{os.getpid()}_{next(self._group_numbers)}"

    async def _prepare(self) -> None:
        if self._group is not None:
            return
        infos = await asyncio.gather(*(client.server_info() for client in self._clients))
        sizes = [info["tp_size"] for info in infos]
        world_size = 1 + sum(sizes)
        # Not torch.distributed.rendezvous: under torchrun it would look for torchrun's own store.
        store = dist.TCPStore(self._master_address, 0, world_size, is_master=True, wait_for_workers=False,
                              timeout=timedelta(seconds=self._timeout_s))
        joins = [
            asyncio.create_task(client.init_weights_update_group(
                master_address=self._master_address, master_port=store.port, rank_offset=1 + sum(sizes[:place]),
                world_size=world_size, group_name=self._group_name, backend=self._backend))
            for place, client in enumerate(self._clients)
        ]
        self._group = await asyncio.to_thread(
            _join_group, self._backend, store, world_size, self._group_name, timedelta(seconds=self._timeout_s))
        await asyncio.gather(*joins)

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        flat = bucket.flatten().to(self._device)
        metadata = _bucket_metadata(bucket)

        async def receive(client: EngineClient) -> None:
            await client.update_weights_from_distributed(
                [item.name for item in metadata],
                [str(item.dtype).removeprefix("torch.") for item in metadata],
                [list(item.shape) for item in metadata],
                group_name=self._group_name, load_format=FLATTENED_BUCKET, flush_cache=False,
                version=version if bucket.last else None)

        receivers = asyncio.create_task(self._on_all(where, receive))
        work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        # An engine that refuses never joins the broadcast: watch both.
        while not (work.is_completed() or receivers.done()):
            await asyncio.sleep(POLL_S)
        await receivers
        work.wait()

    def close(self) -> None:
        """Ends the group here and in the engines, so that its memory is free."""
        if self._group is None:
            return
        self._run(self._on_all(
            "closing the group", lambda client: client.destroy_weights_update_group(self._group_name)))
        dist.destroy_process_group(self._group)
        self._group = None


class DiskPublisher(_EnginePublisher):
    """Writes a Hugging Face folder `folder/version_N` that engine and trainer both see, and has it loaded.

    config_folder: where config.json, the configuration file and the tokenizer are copied from. The folder
    appears under its name only when it is whole; the version before it is removed after a success.
    """

    def __init__(
        self, clients: Sequence[EngineClient], *, bucket_bytes: int, folder: str | Path, config_folder: str | Path
    ):
        super().__init__(clients, bucket_bytes=bucket_bytes)
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


async def _end_abandoned_update(client: EngineClient) -> None:
    """End the update that a trainer, killed while it published, has left open in an engine that lives on."""
    try:
        await client.end_weight_update()
    except EngineHTTPError as error:
        if NO_UPDATE_IS_OPEN not in str(error):
            raise


def _bucket_metadata(bucket: Bucket) -> list[SimpleNamespace]:
    metadata, offset = [], 0
    for name, tensor in bucket.tensors:
        metadata.append(SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=offset,
                                        end_idx=offset + tensor.nbytes, numel=tensor.nbytes))
        offset += tensor.nbytes
    return metadata


def _share(payload: object) -> str:
    """A base64 pickle that refers to tensors by named shared memory, which an unrelated process can open."""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(payload)
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    return base64.b64encode(buffer.getvalue()).decode()


def _join_group(
    backend: str, store: dist.Store, world_size: int, name: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Rank 0 of a group beside the trainer's own; mirrors sglang.srt.utils.common.init_custom_process_group."""
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    group, _ = _new_process_group_helper(
        world_size, 0, [], Backend(backend), PrefixStore(name, store), group_name=name, timeout=timeout)
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group
