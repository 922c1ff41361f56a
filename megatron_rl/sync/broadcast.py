"""Sends new weights by broadcast, from trainer rank 0 to every engine rank, over gloo or NCCL."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _abort_process_group,
    _new_process_group_helper,
    _world,
)

from megatron_rl.compat.loopback_store import LoopbackStore
from megatron_rl.config.rollout import is_loopback
from megatron_rl.rollout.background import in_thread
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.sync.buckets import FLATTENED_BUCKET, Bucket, NamedTensor, bucket_metadata
from megatron_rl.sync.memory import EngineMemory
from megatron_rl.sync.publish import Call, EnginePublisher, PublishError, PublishReport

POLL_S = 0.001
JOIN_SLACK_S = 2.0
"""How much longer than an engine's answer we wait for the group, so that the error names the engine."""


class BroadcastPublisher(EnginePublisher):
    """Broadcasts buckets from this process to every engine rank, over gloo or NCCL. It moves tensors to `device`.

    The process group lasts from publish to publish while the same engines are reached; close() ends it. If an engine
    drops out during a broadcast, the group is lost, and so is the publish to all engines.
    """

    _group_numbers = itertools.count()

    def __init__(
        self, clients: Sequence[EngineClient], *, bucket_bytes: int, backend: Literal["gloo", "nccl"],
        device: torch.device | str, timeout_s: float = 300.0, memory: EngineMemory | None = None,
    ):
        super().__init__(clients, bucket_bytes=bucket_bytes, memory=memory)
        self._backend = backend
        self._device = torch.device(device)
        self._master_address = address_for([client.base_url for client in clients])
        self._timeout_s = timeout_s
        self._join_timeout_s = max(client.control_timeout_s for client in clients) + JOIN_SLACK_S
        self._group: dist.ProcessGroup | None = None
        self._group_name = ""
        self._members: list[EngineClient] = []
        self._loading: list[asyncio.Task[None]] = []

    def publish(self, named_tensors: Iterable[NamedTensor], version: int, *, only: Sequence[str] | None = None,
                resume: bool = True) -> PublishReport:
        try:
            report = super().publish(named_tensors, version, only=only, resume=resume)
        except BaseException:
            self._abort_group()  # some rank may still wait in it
            raise
        if report.failures:
            self._abort_group()
        return report

    async def _prepare(self, what: str) -> None:
        self._loading = []
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
        store = LoopbackStore(self._master_address, 0, world_size, is_master=True, wait_for_workers=False,
                              timeout=timedelta(seconds=self._timeout_s))

        async def join(client: EngineClient) -> None:
            await client.init_weights_update_group(
                master_address=self._master_address, master_port=store.port, rank_offset=offsets[client],
                world_size=world_size, group_name=self._group_name, backend=self._backend)

        where = f"{what}: joining the group at {self._master_address}:{store.port}"
        joins = asyncio.create_task(self._on_all_or_none(where, join))
        ours = in_thread(_join_group, self._backend, store, world_size, self._group_name,
                         timedelta(seconds=self._join_timeout_s), daemon=False)
        try:  # whoever fails first says why; the other would only wait
            await asyncio.wait({joins, ours}, return_when=asyncio.FIRST_EXCEPTION)
            if joins.done():
                joins.result()
            self._group = await ours
        except PublishError:  # names the engine
            raise
        except RuntimeError as error:
            raise PublishError(f"{where}: {error}") from error
        finally:
            joins.cancel()
        dist.set_timeout(timedelta(seconds=self._timeout_s), self._group)
        self._members = list(self._active)

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        flat = self._flatten(bucket)
        metadata = bucket_metadata(bucket)

        async def receive(client: EngineClient) -> None:
            await client.update_weights_from_distributed(
                [item.name for item in metadata],
                [str(item.dtype).removeprefix("torch.") for item in metadata],
                [list(item.shape) for item in metadata],
                group_name=self._group_name, load_format=FLATTENED_BUCKET, flush_cache=False,
                version=version if bucket.last else None)

        self._loading.append(asyncio.create_task(self._on_all_or_none(where, receive)))
        # NCCL makes its communicator in a group's first collective, and blocks the caller until every engine is in it:
        # in a thread, the requests that bring the engines there still leave.
        started = in_thread(dist.broadcast, flat, 0, self._group, True, daemon=True)
        try:
            while not (started.done() and started.result().is_completed()):
                for loading in self._loading:
                    if loading.done():
                        loading.result()  # an engine that refuses never joins the broadcast
                await asyncio.sleep(POLL_S)
            # All bytes are there: the engines load them while the next bucket is made and asked for.
            *before, loading = self._loading
            self._loading = [loading]
            await asyncio.gather(*before)
            started.result().wait()
        except PublishError:  # names the engine
            raise
        except RuntimeError as error:  # an engine's end of the connection is gone
            await self._loading[-1]  # names the engine
            raise PublishError(f"{where}: {error}; the engines stay paused") from error

    async def _finish(self, version: int, what: str) -> None:
        await asyncio.gather(*self._loading)
        await super()._finish(version, what)

    def _new_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    async def _on_all_or_none(self, where: str, call: Call) -> None:
        """Like _on_all, but the first failure ends it for all, because the others may wait for the one that failed."""
        tasks = [asyncio.create_task(call(client)) for client in self._active]
        done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for task in done:
            if task.exception() is not None:
                error = task.exception()
                if not isinstance(error, EngineHTTPError):
                    raise error
                raise PublishError(f"{where}: {error}; the engines stay paused") from error

    async def _leave(self) -> None:
        """Ends the group, here and in the engines that still answer, at the same time: each end may wait for the other.

        An engine that does not answer ends the waiting after its control time-out, and the group is aborted.
        """
        engines = asyncio.gather(*(client.destroy_weights_update_group(self._group_name) for client in self._members),
                                 return_exceptions=True)
        ours = in_thread(dist.destroy_process_group, self._group, daemon=True)
        await engines
        if (await asyncio.wait({ours}, timeout=JOIN_SLACK_S))[0]:
            self._group, self._members = None, []
            ours.result()
        else:
            self._abort_group()

    def _abort_group(self) -> None:
        """Ends the group here without waiting for anyone. Gloo has no abort; its end waits for nobody."""
        group, self._group, self._members = self._group, None, []
        if group is None:
            return
        if self._backend == "nccl":
            _abort_process_group(group)
        else:
            dist.destroy_process_group(group)

    def close(self) -> None:
        """Ends the group, so that its memory is free."""
        if self._group is not None:
            self._run(self._leave())


def address_for(urls: Sequence[str]) -> str:
    """This machine's address, as the servers at `urls` reach it. ValueError if there is none.

    An address that another machine can reach is preferred. It works from here too, while loopback does not lead here
    from another machine.
    """
    found = []
    for url in urls:
        parts = urlsplit(url)
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(
                parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)  # of datagrams: finds the way and sends nothing
                found.append(probe.getsockname()[0])
        except OSError as error:
            raise ValueError(f"rollout.engine.urls: no way to {url}: {error}") from error
    return next((address for address in found if not is_loopback(address)), found[0])


def _join_group(
    backend: str, store: dist.Store, world_size: int, name: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Rank 0 of a group beside the trainer's own; mirrors sglang.srt.utils.common.init_custom_process_group."""
    group, _ = _new_process_group_helper(
        world_size, 0, [], Backend(backend), PrefixStore(name, store), group_name=name, timeout=timeout)
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group
