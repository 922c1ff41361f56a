"""Rank 0 pauses the engines and sends tensors to them. The orchestrator decides whether they serve again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config.schema import Config
from megatron_rl.model.adapter_folder import peft_config, peft_tensors
from megatron_rl.model.architectures import read_config
from megatron_rl.model.config import DTYPES
from megatron_rl.model.network import Network
from megatron_rl.rollout.client import EngineClient, engine_clients
from megatron_rl.sync.adapter import AdapterPublisher
from megatron_rl.sync.broadcast import BroadcastPublisher
from megatron_rl.sync.buckets import NamedTensor
from megatron_rl.sync.disk import DiskPublisher
from megatron_rl.sync.memory import EngineMemory, free_bytes
from megatron_rl.sync.publish import Publisher, PublishError
from megatron_rl.sync.tensor import TensorPublisher
from megatron_rl.sync.verify import EngineLayout, ExpectedChecksums, predictable

_LOG = logging.getLogger(__name__)


class Sender:
    """Sends one version at a time to the engines that the orchestrator names."""

    def __init__(self, config: Config, network: Network, device: torch.device):
        self._clients = engine_clients(config)
        self._memory = engine_memory(config, device)
        self._publisher = build_publisher(config, self._clients, device, self._memory)
        self._network = asdict(network)
        self._engine_dtype = DTYPES[config.rollout.engine.dtype or config.model.dtype]

    def send(self, tensors: Iterable[NamedTensor], version: int, urls: Sequence[str], *,
             layouts: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """Sends `tensors`. Engines that got them hold them and stay paused.

        layouts: (device, tensor-parallel size) of engines whose checksums are to be predicted.
        failures: by URL, why an engine did not get the weights. digests: by EngineLayout, what the checksums of such
        an engine's ranks must be; none if they cannot be predicted for this network.
        """
        expected = self._expected(layouts)
        for each in expected.values():
            tensors = each.watch(tensors)
        return self._publish(tensors, version, urls,
                             lambda: {layout: each.digests() for layout, each in expected.items()})

    def _expected(self, layouts: Sequence[tuple[str, int]]) -> dict[str, ExpectedChecksums]:
        return {str(layout): ExpectedChecksums(self._network, engine_dtype=self._engine_dtype, layout=layout)
                for layout in (EngineLayout(device, tp) for device, tp in layouts)
                if predictable(self._network, layout)}

    def _publish(self, tensors: Iterable[NamedTensor], version: int, urls: Sequence[str],
                 digests: Callable[[], dict[str, list[dict[str, str]]]]) -> dict[str, Any]:
        """The outcome of send()."""
        outcome: dict[str, Any] = {"failures": {}, "bytes": 0, "digests": {}}
        try:
            report = self._publisher.publish(tensors, version, only=urls, resume=False)
            outcome |= {"failures": dict(report.failures), "bytes": report.bytes, "digests": digests()}
        except PublishError as error:
            outcome["failures"] = dict.fromkeys(urls, str(error))
        return outcome | {"free_bytes": {} if self._memory is None else dict(self._memory.free_bytes)}

    def make_room(self, urls: Sequence[str]) -> None:
        """Has the engines at `urls` release all their memory."""

        async def release() -> None:
            clients = [client for client in self._clients if client.base_url in urls]
            try:
                await self._memory.release(clients)
            finally:
                await asyncio.gather(*(client.close() for client in clients))

        asyncio.run(release())

    def close(self) -> None:
        self._publisher.close()


class AdapterSender(Sender):
    """Sends adapters alone (rollout.publish=adapter). The digests are those of the weights that engines keep."""

    _publisher: AdapterPublisher

    def __init__(self, config: Config, network: Network, device: torch.device):
        super().__init__(config, network, device)
        self._lora, self._parsed = config.model.lora, network
        self._digests: dict[str, list[dict[str, str]]] = {}

    def expect(self, weights: Iterable[NamedTensor], layouts: Sequence[tuple[str, int]]) -> None:
        """Engines of these layouts should hold `weights`, which is not sent."""
        expected = self._expected(layouts)
        for each in expected.values():
            weights = each.watch(weights)
        for _ in weights:
            pass
        self._digests = {layout: each.digests() for layout, each in expected.items()}

    def send(self, tensors: Iterable[NamedTensor], version: int, urls: Sequence[str], *,
             layouts: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """As Sender.send, with the adapters' matrices. adapter: the name that requests must give."""
        matrices = peft_tensors(self._lora, self._parsed, tensors)
        outcome = self._publish(matrices.items(), version, urls, lambda: self._digests)
        return outcome | {"adapter": self._publisher.name}


def engine_memory(config: Config, device: torch.device) -> EngineMemory | None:
    """None unless engines share the trainer's GPUs. On CPU SGLang obeys but frees nothing; a warning says so."""
    if not config.rollout.engine.colocate:
        return None
    if device.type == "cpu":
        _LOG.warning("rollout.engine.colocate=true: SGLang has no memory saver on CPU; the engines are told to release "
                     "their memory in every step, and keep it")
    return EngineMemory(partial(free_bytes, device))


def build_publisher(config: Config, clients: Sequence[EngineClient], device: torch.device,
                    memory: EngineMemory | None = None) -> Publisher:
    """The transport that rollout.publish names."""
    shared = {"bucket_bytes": config.rollout.bucket_bytes, "memory": memory}
    if config.rollout.publish == "tensor":
        return TensorPublisher(clients, **shared)
    if config.rollout.publish == "broadcast":
        backend = "nccl" if device.type == "cuda" else "gloo"
        return BroadcastPublisher(clients, **shared, backend=backend, device=device)
    if config.rollout.publish == "adapter":
        return AdapterPublisher(clients, config=peft_config(config.model, read_config(config.model.path)))
    return DiskPublisher(clients, **shared, folder=Path(config.run.dir) / "published", config_folder=config.model.path)
