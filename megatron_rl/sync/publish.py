"""Sends new weights to the engines: through shared memory, a broadcast, or a folder.

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
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import save_file

from megatron_rl.rollout.client import EngineClient, EngineHTTPError
from megatron_rl.sync.buckets import FLATTENED_BUCKET, Bucket, NamedTensor, bucket_metadata, make_buckets
from megatron_rl.sync.verify import WeightMismatchError

POLL_S = 0.001
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


class _EnginePublisher:
    """What all publishers share: versions, pausing and resuming, engines that drop out, and the report."""

    def __init__(self, clients: Sequence[EngineClient], *, bucket_bytes: int):
        if not clients:
            raise ValueError("rollout.engine.urls is empty: a publisher needs at least one engine")
        self._clients = tuple(clients)
        self._bucket_bytes = bucket_bytes
        self._version: int | None = None
        self._active: list[EngineClient] = []
        self._failures: dict[str, str] = {}

    def publish(self, named_tensors: Iterable[NamedTensor], version: int, *, only: Sequence[str] | None = None,
                check: Check | None = None) -> PublishReport:
        if self._version is not None and (version < self._version or (version == self._version and only is None)):
            raise ValueError(f"weight version {version} does not follow {self._version}: versions must grow")
        start = time.perf_counter()
        self._active = [client for client in self._clients if only is None or client.base_url in only]
        self._failures = {}
        tensors, num_bytes, buckets = self._run(self._publish(named_tensors, version, check))
        self._version = version
        return PublishReport(version, tensors, num_bytes, buckets, time.perf_counter() - start, dict(self._failures))

    def close(self) -> None:
        """Nothing is held between publishes, unless a subclass says so."""

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
                log = "" if client.log_path is None else f"; log: {client.log_path}"
                self._failures[client.base_url] = f"{where}: {answer}{log}; the engine stays paused"
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
        await self._begin(what)
        tensors = num_bytes = buckets = 0
        for bucket in make_buckets(named_tensors, self._bucket_bytes):
            await self._send(bucket, version, f"{what}: {bucket.describe()}")
            tensors += len(bucket.tensors)
            num_bytes += bucket.num_bytes
            buckets += 1
        await self._finish(version, what)
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


class TensorPublisher(_EnginePublisher):
    """Buckets in shared memory of this machine; only their address travels over HTTP."""

    def __init__(self, clients: Sequence[EngineClient], *, bucket_bytes: int):
        super().__init__(clients, bucket_bytes=bucket_bytes)
        self._tp_sizes: dict[EngineClient, int] = {}

    async def _prepare(self, what: str) -> None:
        async def ask(client: EngineClient) -> None:
            self._tp_sizes[client] = (await client.server_info())["tp_size"]

        await self._on_all(f"{what}: server_info", ask)

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        flat = bucket.flatten().cpu()
        metadata = bucket_metadata(bucket)

        async def send(client: EngineClient) -> None:
            # One pickle per receiving rank: each counts as one reader of the shared memory.
            payloads = [_share({"flattened_tensor": flat, "metadata": metadata})
                        for _ in range(self._tp_sizes[client])]
            await client.update_weights_from_tensor(
                payloads, load_format=FLATTENED_BUCKET, flush_cache=False, version=version if bucket.last else None)

        await self._on_all(where, send)


class BroadcastPublisher(_EnginePublisher):
    """Buckets broadcast from this process to every engine rank, over gloo or NCCL. Tensors are moved to `device`.

    The process group lasts from publish to publish while the same engines are reached, and is ended by close().
    When an engine drops out in the middle of a broadcast the group is lost, and with it the publish to all of them.
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
        self._group_name = ""
        self._members: list[EngineClient] = []

    def publish(self, named_tensors: Iterable[NamedTensor], version: int, *, only: Sequence[str] | None = None,
                check: Check | None = None) -> PublishReport:
        try:
            report = super().publish(named_tensors, version, only=only, check=check)
        except BaseException:
            self._drop_group()  # some rank may still wait in it
            raise
        if report.failures:
            self._drop_group()
        return report

    async def _prepare(self, what: str) -> None:
        if self._group is not None and self._members == self._active:
            return
        if self._group is not None:
            await self._leave()
        sizes: dict[EngineClient, int] = {}

        async def ask(client: EngineClient) -> None:
            sizes[client] = (await client.server_info())["tp_size"]

        await self._on_all(f"{what}: server_info", ask)
        world_size = 1 + sum(sizes[client] for client in self._active)
        offsets = dict(zip(self._active, itertools.accumulate(
            [1, *(sizes[client] for client in self._active)]), strict=False))
        self._group_name = f"megatron_rl_{os.getpid()}_{next(self._group_numbers)}"
        # Not torch.distributed.rendezvous: under torchrun it would look for torchrun's own store.
        store = dist.TCPStore(self._master_address, 0, world_size, is_master=True, wait_for_workers=False,
                              timeout=timedelta(seconds=self._timeout_s))

        async def join(client: EngineClient) -> None:
            await client.init_weights_update_group(
                master_address=self._master_address, master_port=store.port, rank_offset=offsets[client],
                world_size=world_size, group_name=self._group_name, backend=self._backend)

        joins = asyncio.create_task(self._on_all_or_none(f"{what}: joining the group", join))
        self._group = await asyncio.to_thread(
            _join_group, self._backend, store, world_size, self._group_name, timedelta(seconds=self._timeout_s))
        await joins
        self._members = list(self._active)

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        flat = bucket.flatten().to(self._device)
        metadata = bucket_metadata(bucket)

        async def receive(client: EngineClient) -> None:
            await client.update_weights_from_distributed(
                [item.name for item in metadata],
                [str(item.dtype).removeprefix("torch.") for item in metadata],
                [list(item.shape) for item in metadata],
                group_name=self._group_name, load_format=FLATTENED_BUCKET, flush_cache=False,
                version=version if bucket.last else None)

        receivers = asyncio.create_task(self._on_all_or_none(where, receive))
        work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        # An engine that refuses never joins the broadcast: watch both.
        while not (work.is_completed() or receivers.done()):
            await asyncio.sleep(POLL_S)
        await receivers
        try:
            work.wait()
        except RuntimeError as error:  # an engine's end of the connection is gone
            raise PublishError(f"{where}: {error}; the engines stay paused") from error

    async def _on_all_or_none(self, where: str, call: Check) -> None:
        """As _on_all, but the first failure ends it for all: the others may wait for the one that failed."""
        tasks = {asyncio.create_task(call(client)): client for client in self._active}
        done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for task in done:
            if task.exception() is not None:
                client, error = tasks[task], task.exception()
                if not isinstance(error, EngineHTTPError):
                    raise error
                log = "" if client.log_path is None else f"; log: {client.log_path}"
                raise PublishError(f"{where}: {error}{log}; the engines stay paused") from error

    async def _leave(self) -> None:
        """Ends the group here and in the engines that still answer."""
        await asyncio.gather(*(client.destroy_weights_update_group(self._group_name) for client in self._members),
                             return_exceptions=True)
        self._drop_group()

    def _drop_group(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group, self._members = None, []

    def close(self) -> None:
        """Ends the group, so that its memory is free."""
        if self._group is not None:
            self._run(self._leave())


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
