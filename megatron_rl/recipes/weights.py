"""From the trainer's shards to engines that are proven to serve them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rl.config.schema import Config
from megatron_rl.model.config import DTYPES
from megatron_rl.model.convert import Exporter
from megatron_rl.recipes.probe import Probe
from megatron_rl.recipes.serving import Serving
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.sync.broadcast import BroadcastPublisher
from megatron_rl.sync.buckets import NamedTensor
from megatron_rl.sync.disk import DiskPublisher
from megatron_rl.sync.memory import EngineMemory
from megatron_rl.sync.publish import Publisher, PublishError
from megatron_rl.sync.tensor import TensorPublisher
from megatron_rl.sync.verify import ExpectedChecksums, UnpredictableChecksumsError, WeightMismatchError, verify_engine
from megatron_rl.topology import Topology

ATTEMPTS = 3
WAIT_POLL_S = 0.2


class PublishedWeights:
    """loop.Weights: all ranks stream their shards, rank 0 sends them on and has the engines prove what they hold.

    channel is None on other ranks.
    """

    def __init__(self, exporter: Exporter, topology: Topology, probe: Probe, channel: Channel | None):
        self._exporter, self._topology, self._probe, self._channel = exporter, topology, probe, channel
        self._version: int | None = None

    def publish(self, version: int) -> None:
        """To every engine that answers; engines that fail serve nothing until catch_up() or the next publish.

        Tried again while no engine has the weights; raises PublishError or WeightMismatchError after ATTEMPTS.
        """
        if self._version is not None and version <= self._version:
            raise ValueError(f"weight version {version} does not follow {self._version}: versions must grow")
        self._version = version
        for attempt in range(1, ATTEMPTS + 1):
            if self._send(None, last=attempt == ATTEMPTS):
                return

    def catch_up(self) -> None:
        """The version published last, to engines that answer and do not hold it. Between updates of the policy only."""
        self._send(self._channel.behind() if self._channel is not None else None, last=False)

    def make_room(self) -> None:
        """Collective: engines that share the trainer's GPUs give up their memory until the next publish."""
        if self._channel is not None:
            self._channel.make_room()
        self._topology.barrier()

    def _send(self, only: Sequence[str] | None, *, last: bool) -> bool:
        """Collective. Whether some engine has the weights now."""
        reference = self._probe()
        tensors = self._exporter()
        done = None
        if self._channel is not None:
            done = self._channel.send(tensors, self._version, only, reference, last=last)
        for _ in tensors:  # on rank 0: what a failed publish left, which the other ranks send all the same
            pass
        return self._topology.broadcast_object(done)

    def metrics(self) -> dict[str, float]:
        """Of the last publish, and the memory that was free in each phase of a colocated step; rank 0 only."""
        return {**self._channel.metrics, **self._channel.free_bytes()}


class Channel:
    """Rank 0's way to the engines: a publisher, what checks it, and the fleet that must know the outcome.

    network: the sizes of the model as ExpectedChecksums reads them.
    """

    def __init__(self, config: Config, network: Mapping[str, Any], serving: Serving,
                 clients: Sequence[EngineClient], publisher: Publisher, probe_tokens: Sequence[int],
                 memory: EngineMemory | None = None):
        rollout = config.rollout
        engine_dtype = DTYPES[rollout.engine.dtype or config.model.dtype]
        self._serving, self._clients, self._publisher, self._memory = serving, clients, publisher, memory
        self._expected = (None if rollout.verify_checksums is False
                          else ExpectedChecksums(network, engine_dtype=engine_dtype))
        self._must_verify = rollout.verify_checksums is True
        self._verified: set[str] = set()
        self._probe_tokens = list(map(int, probe_tokens))
        self._probe_tolerance = rollout.probe_tolerance
        self._wait_s = rollout.engine.wait_timeout_s
        self.metrics: dict[str, float] = {}

    def behind(self) -> list[str]:
        return self._serving.fleet.behind()

    def make_room(self) -> None:
        """The engines that answer release all memory and serve nothing until the next publish."""
        answering = self._serving.fleet.answering()

        async def release() -> list[str]:
            clients = [client for client in self._clients if client.base_url in answering]
            try:
                return await self._memory.release(clients)
            finally:
                await asyncio.gather(*(client.close() for client in clients))

        self._serving.tell(self._serving.fleet.emptied, answering)
        asyncio.run(release())

    def free_bytes(self) -> dict[str, float]:
        if self._memory is None:
            return {}
        return {f"memory/free_bytes_{phase}": free for phase, free in self._memory.free_bytes.items()}

    def send(self, tensors: Iterable[NamedTensor], version: int, only: Sequence[str] | None, reference: np.ndarray, *,
             last: bool) -> bool:
        """Whether some engine has `version` now. Raises what went wrong when none has and this is the last attempt."""
        fleet = self._serving.fleet
        urls = self._answering() if only is None else list(only)
        if not urls:  # gone again since they were seen to be behind
            for _ in tensors:
                pass
            return False
        self._serving.tell(fleet.updating, version, urls)
        failures, failure = dict.fromkeys(urls, "the publish was broken off"), None
        self._verified.clear()
        try:
            watched = tensors if self._expected is None else self._expected.watch(tensors)
            report = self._publisher.publish(watched, version, only=urls, check=self._check)
            gaps = self._gaps([url for url in urls if url not in report.failures], reference)
            failures = {**report.failures, **{url: gap for url, gap in gaps.items() if isinstance(gap, str)}}
            differences = [gap for gap in gaps.values() if isinstance(gap, float)]
            if differences and only is None:
                self.metrics = {"sync/version": version, "sync/bytes": report.bytes,
                                "sync/probe_max_abs": max(differences), "sync/engines_verified": len(self._verified)}
        except (PublishError, WeightMismatchError) as error:
            failures, failure = dict.fromkeys(urls, str(error)), error
        finally:
            self._serving.tell(fleet.published, version, [url for url in urls if url not in failures], failures)
        served = len(failures) < len(urls)
        if last and not served:
            raise failure or PublishError(f"publishing version {version}: {'; '.join(failures.values())}")
        return served

    def _answering(self) -> list[str]:
        """URLs of the engines that answer; waits for the first."""
        deadline = time.monotonic() + self._wait_s
        while not (urls := self._serving.fleet.answering()):
            if time.monotonic() > deadline:
                raise PublishError(f"no engine answered for rollout.engine.wait_timeout_s={self._wait_s:g}: "
                                   f"{self._serving.fleet.describe()}")
            time.sleep(WAIT_POLL_S)
        return urls

    async def _check(self, client: EngineClient) -> None:
        """Of an engine that cannot be predicted: nothing, and no later publish hashes what it sends."""
        if self._expected is None:
            return
        try:
            await verify_engine(client, self._expected.digests())
        except UnpredictableChecksumsError:
            if self._must_verify:
                raise
            self._expected = None
        else:
            self._verified.add(client.base_url)

    def _gaps(self, urls: Sequence[str], reference: np.ndarray) -> dict[str, float | str]:
        """Per engine: the largest difference of its probe to the trainer's, or why it failed the probe."""

        async def ask(client: EngineClient) -> float | str:
            try:
                found = await client.input_logprobs(self._probe_tokens, rid="probe.")
            except EngineHTTPError as error:
                return f"probe: {error}"
            finally:
                await client.close()
            gap = float(np.abs(found - reference).max())
            if self._probe_tolerance is not None and not gap <= self._probe_tolerance:
                return (f"probe: log-probabilities of the fixed prompt differ by {gap:.3g} from the trainer's, more "
                        f"than rollout.probe_tolerance={self._probe_tolerance:g}")
            return gap

        async def ask_all() -> dict[str, float | str]:
            clients = [client for client in self._clients if client.base_url in urls]
            answers = await asyncio.gather(*map(ask, clients))
            return {client.base_url: answer for client, answer in zip(clients, answers, strict=True)}

        return asyncio.run(ask_all())


def build_publisher(config: Config, clients: Sequence[EngineClient], device: torch.device,
                    memory: EngineMemory | None = None) -> Publisher:
    """The transport that rollout.publish names."""
    shared = {"bucket_bytes": config.rollout.bucket_bytes, "memory": memory}
    if config.rollout.publish == "tensor":
        return TensorPublisher(clients, **shared)
    if config.rollout.publish == "broadcast":
        backend = "nccl" if device.type == "cuda" else "gloo"
        return BroadcastPublisher(clients, **shared, backend=backend, device=device)
    return DiskPublisher(clients, **shared, folder=Path(config.run.dir) / "published", config_folder=config.model.path)
