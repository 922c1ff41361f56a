"""Owns the version that the engines serve: when they get weights, whether they hold them, and who is behind.

The trainer sends tensors and leaves the engines paused. Then each engine proves by checksums that it holds them, goes
on, and proves by the log-probabilities of a fixed prompt that it computes with them. The fleet learns the outcome.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np

from megatron_rl.config.schema import Config
from megatron_rl.orchestrator.port import TrainerPort
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.sync.publish import PublishError
from megatron_rl.sync.verify import (
    EngineLayout,
    UnpredictableChecksumsError,
    WeightMismatchError,
    layout_of,
    unproven,
    verify_engine,
)

_LOG = logging.getLogger(__name__)
ATTEMPTS = 3
WAIT_POLL_S = 0.2
CATCH_UP_POLL_S = 0.1


class PublishedWeights:
    """loop.Weights. metrics: of the last publish, with the free memory in each phase of a colocated step."""

    def __init__(self, config: Config, port: TrainerPort, fleet: Fleet):
        rollout = config.rollout
        self._port, self._fleet = port, fleet
        self._checksums, self._must_verify = rollout.verify_checksums is not False, rollout.verify_checksums is True
        self._tolerance, self._wait_s = rollout.probe_limit(config.model.dtype), rollout.engine.wait_timeout_s
        self._version: int | None = None
        self._verified: set[str] = set()
        self._layouts: dict[str, EngineLayout | None] = {}  # by URL; None: its checksums cannot be predicted
        self._unproven: dict[str, set[str]] = {}  # by URL of a GPU engine: parameters that it holds in its own way
        self.probe_tokens: list[int] = []
        self.metrics: dict[str, float] = {}

    async def publish(self, version: int) -> None:
        """Publishes to every engine that answers. An engine that fails serves nothing until catch_up() or the next
        publish.

        Tries again while no engine has the weights; PublishError after ATTEMPTS.
        """
        if self._version is not None and version <= self._version:
            raise ValueError(f"weight version {version} does not follow {self._version}: versions must grow")
        self._version = version
        for attempt in range(1, ATTEMPTS + 1):
            urls = await self._answering()
            failures = await self._send(urls)
            if len(failures) < len(urls):
                return
            if attempt == ATTEMPTS:
                raise PublishError(f"publishing version {version}: {'; '.join(failures.values())}")

    async def catch_up(self) -> None:
        """Sends the last published version to engines that answer and lack it. Only between updates of the policy."""
        urls = self._fleet.behind()
        if urls:
            await self._send(urls, first=False)

    async def while_serving(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The coroutine's result. Engines that come back meanwhile catch up; the trainer waits and has time to send."""
        task = asyncio.create_task(coroutine)
        try:
            while not (await asyncio.wait({task}, timeout=CATCH_UP_POLL_S))[0]:
                await self.catch_up()
        finally:
            task.cancel()
        return await task

    async def make_room(self) -> None:
        """Engines that share the trainer's GPUs give up their memory; they serve nothing until the next publish."""
        urls = self._fleet.answering()
        self._fleet.emptied(urls)
        await self._port.execute("make_room", urls=urls)

    async def _send(self, urls: Sequence[str], *, first: bool = True) -> dict[str, str]:
        """By URL: why an engine does not hold the version now. first: its metrics are logged."""
        version, failures = self._version, dict.fromkeys(urls, "the publish was broken off")
        self._fleet.updating(version, urls)
        self._verified.clear()
        try:
            await asyncio.gather(*(self._learn_layout(url) for url in urls if self._checksums))
            layouts = sorted({layout for url in urls if (layout := self._layouts.get(url)) is not None})
            sent = await self._port.execute("publish", version=version, urls=list(urls),
                                            layouts=[(each.device, each.tp) for each in layouts])
            reached = [url for url in urls if url not in sent["failures"]]
            proofs = dict(zip(reached, await asyncio.gather(*(self._prove(url, sent) for url in reached)), strict=True))
            failures = {**sent["failures"], **{url: proof for url, proof in proofs.items() if isinstance(proof, str)}}
            gaps = [proof for proof in proofs.values() if not isinstance(proof, str)]
            if gaps and first:
                self.metrics = {
                    "sync/version": version, "sync/bytes": sent["bytes"], "sync/probe_max_abs": max(gaps),
                    "sync/engines_verified": len(self._verified),
                    **{f"memory/free_bytes_{phase}": free for phase, free in sent["free_bytes"].items()}}
        finally:
            self._fleet.published(version, [url for url in urls if url not in failures], failures)
        return failures

    async def _prove(self, url: str, sent: dict[str, Any]) -> float | str:
        """The largest difference of its log-probabilities to the trainer's, or the reason why it may not serve."""
        client, reference = self._fleet.client(url), np.asarray(sent["reference"], dtype=np.float32)
        client.adapter = sent.get("adapter")
        try:
            if (layout := self._layouts.get(url)) is not None:
                await self._verify(url, layout, sent["digests"].get(str(layout)))
            await client.continue_generation()
            found = await client.input_logprobs(self.probe_tokens, rid="probe.")
        except (EngineHTTPError, WeightMismatchError) as error:
            return f"check: {error}"
        gap = float(np.abs(found - reference).max())
        if not gap <= self._tolerance:
            return (f"{url}: log-probabilities of the fixed prompt differ by {gap:.3g} from the trainer's, more than "
                    f"rollout.probe_tolerance={self._tolerance:g}")
        return gap

    async def _learn_layout(self, url: str) -> None:
        """Once for each engine. One that cannot be predicted is said once, and takes nothing from the others."""
        if url in self._layouts:
            return
        try:
            self._layouts[url] = layout_of(await self._fleet.client(url).server_info(), url)
        except EngineHTTPError:
            return  # the publish will tell
        except UnpredictableChecksumsError as error:
            self._leave_to_probe(url, error)

    def _leave_to_probe(self, url: str, error: UnpredictableChecksumsError) -> None:
        if self._must_verify:
            raise error
        self._layouts[url] = None
        _LOG.warning("%s. Its weights are proven by the probe alone (rollout.probe_tolerance)", error)

    async def _verify(self, url: str, layout: EngineLayout, digests: list[dict[str, str]] | None) -> None:
        """Compares the engine's checksums with `digests`; None: the trainer cannot predict them for this network.

        A GPU engine may keep some parameters in an order of its own. Unless rollout.verify_checksums=true, those that
        differ in its first publish are said once and left to the probe; all others must agree from then on.
        """
        client = self._fleet.client(url)
        if digests is None:
            self._leave_to_probe(url, UnpredictableChecksumsError(
                f"engine {url} shares this network among {layout.tp} ranks in a way that cannot be predicted; set "
                "rollout.verify_checksums=null or false"))
            return
        if layout.device == "cuda" and not self._must_verify and url not in self._unproven:
            self._unproven[url] = await unproven(client, digests)
            if names := sorted(self._unproven[url]):
                _LOG.warning("engine %s holds %d parameters in another form than predicted (%s, ...); these are proven "
                             "by the probe alone (rollout.probe_tolerance)", url, len(names), names[0])
        left_out = self._unproven.get(url, set())
        await verify_engine(client, digests, leave_out=left_out)
        if any(digest.keys() - left_out for digest in digests):
            self._verified.add(url)

    async def _answering(self) -> list[str]:
        """URLs of the engines that answer; waits for the first."""
        deadline = time.monotonic() + self._wait_s
        while not (urls := self._fleet.answering()):
            if time.monotonic() > deadline:
                raise PublishError(f"no engine answered for rollout.engine.wait_timeout_s={self._wait_s:g}: "
                                   f"{self._fleet.describe()}")
            await asyncio.sleep(WAIT_POLL_S)
        return urls
