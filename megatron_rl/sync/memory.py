"""Engines on the trainer's own GPUs: they give up their memory while it trains and get it back in two phases.

generating -> release everything -> training -> resume the weights -> publishing -> resume the cache -> serving

Releasing discards the contents, so an engine serves nothing until the next publish has reached it. Meanwhile it has the
label EMPTIED. An engine that was started again has all its memory, and another label. Free bytes are noted after every
phase, on rank 0's device. Written for SGLang 0.5.23 (sglang/srt/managers/scheduler_components/weight_updater.py:
release_memory_occupation), started with --enable-memory-saver. Its server dies if it is asked to release while a
request runs, or what it has released, or to resume what it has not; the order of calls here avoids all three. On CPU it
obeys and keeps its memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError, EngineUnreachableError
from megatron_rl.rollout.supervisor import EMPTIED, NOTHING_PUBLISHED

WEIGHTS = ("weights",)
CACHE = ("kv_cache", "cuda_graph")
IDLE_POLL_S = 0.1

_LOG = logging.getLogger(__name__)


def free_bytes(device: torch.device) -> int:
    """Free memory of the GPU, for all its processes; of the machine if `device` is a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


class EngineMemory:
    """What the engines have released and not got back, by URL. free_bytes: phase -> bytes, in the last step."""

    def __init__(self, measure: Callable[[], int]):
        self._measure = measure
        self._released: dict[str, set[str]] = {}
        self.free_bytes: dict[str, int] = {}

    async def release(self, clients: Sequence[EngineClient]) -> list[str]:
        """URLs of the engines that released. If one fails, a warning names it, and it keeps its memory."""
        self._note("generating")
        answers = await asyncio.gather(*map(self._release, clients), return_exceptions=True)
        self._note("training")
        released = []
        for client, answer in zip(clients, answers, strict=True):
            if isinstance(answer, EngineHTTPError):
                _LOG.warning("an engine did not release its memory for training: %s", answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                released.append(client.base_url)
        return released

    async def _release(self, client: EngineClient) -> None:
        released = await self._released_by(client)
        held = [tag for tag in (*CACHE, *WEIGHTS) if tag not in released]
        if not held:
            return
        await _until_idle(client)
        await client.release_memory_occupation(held)  # refused, it still has all: it must not be told to resume it
        released.update(held)
        await client.label_weights(EMPTIED)

    async def _released_by(self, client: EngineClient) -> set[str]:
        """What the engine has released, kept in self._released. Its label says what happened without us."""
        label = await client.weight_version()
        if label in (None, NOTHING_PUBLISHED):  # it was started again
            self._released[client.base_url] = set()
        return self._released.setdefault(client.base_url, {*CACHE, *WEIGHTS} if label == EMPTIED else set())

    async def resume_weights(self, client: EngineClient) -> None:
        """Call it before new weights are sent. An engine that was started again meanwhile has nothing to get back."""
        await self._released_by(client)
        await self._resume(client, WEIGHTS)
        self._note("publishing")

    async def resume_cache(self, client: EngineClient) -> None:
        """Call it before the engine serves."""
        await self._resume(client, CACHE)
        self._note("serving")

    async def _resume(self, client: EngineClient, tags: Sequence[str]) -> None:
        mine = self._released.get(client.base_url, set())
        missing = [tag for tag in tags if tag in mine]
        mine.difference_update(missing)  # beforehand: one that fails is not asked twice
        if missing:
            await client.resume_memory_occupation(missing)

    def _note(self, phase: str) -> None:
        self.free_bytes[phase] = self._measure()
        _LOG.info("%s: %.2f GiB of memory free", phase, self.free_bytes[phase] / 2**30)


async def _until_idle(client: EngineClient) -> None:
    """Waits until no request runs: before that the engine refuses to flush.

    Aborted requests end at their next token.
    """
    deadline = time.monotonic() + client.control_timeout_s
    while True:
        try:
            return await client.flush_cache()
        except EngineHTTPError as error:
            if isinstance(error, EngineUnreachableError) or time.monotonic() > deadline:
                raise
        await asyncio.sleep(IDLE_POLL_S)
