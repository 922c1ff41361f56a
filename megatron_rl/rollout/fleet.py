"""Spreads requests over engines, some of which may die, hang, or answer nonsense.

An engine serves only while it answers and is known to hold the newest published weights. A publish that reached its end
marks it (`published`). It loses the mark if it stops answering or if its own label says otherwise, as after a restart
(engines start with a negative label). Every response is checked against the versions that were current while it was
sampled, so nothing that other weights sampled gets through.

A request that fails goes to another engine, with the same seed and a new attempt in its id. Each request returns one
result, so a retry never counts twice. An engine that keeps failing rests, longer each time, and then gets one request
at a time. An engine whose connection broke gets no request until the watch has heard from it, so a request loses at
most one attempt to an engine that died.

What an engine answers while it gets new weights is held back until checksums and probe have proven them. If it fails
there, it counts as lost, and its requests go elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import (
    EngineBusyError,
    EngineDisconnectedError,
    EngineHTTPError,
    EngineUnreachableError,
    RequestRefusedError,
)
from megatron_rl.rollout.member import Member
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.rollout.sampling import GenerateResult, SamplingParams
from megatron_rl.types import Finish

PROBE_TIMEOUT_S = 10.0
ABORT_GRACE_S = 5.0
CHOICE_POLL_S = 0.05


type Ask[R] = Callable[[EngineClient, str], Coroutine[Any, Any, R]]
"""(engine, id of the attempt) -> its answer."""
type Check[R] = Callable[[R, str, int | None], None]
"""(answer, id of the attempt, the version that was current when it began): EngineHTTPError if it is no good."""


class FleetError(RuntimeError):
    """A request could not be answered.

    The message names the request, the last failure, and the state of every engine.
    """


@dataclass
class Tally:
    """Tokens that engines delivered, useful or not, and requests that were sent again."""

    delivered_tokens: int = 0
    retries: int = 0


class Fleet:
    """All engines of one run, on one event loop: start() begins the watch, close() ends it and the connections.

    version None: nothing was published, and the engines are used as they are.
    """

    def __init__(self, clients: Sequence[EngineClient], config: RolloutConfig):
        if not clients:
            raise ValueError("rollout.engine.urls is empty: a fleet needs at least one engine")
        self._members = tuple(Member(client) for client in clients)
        self._config = config
        self._version: int | None = None
        self._upcoming: int | None = None
        self._slots = asyncio.Semaphore(config.concurrency)
        self._queues: list[int] = []
        self.watch: asyncio.Task | None = None

    async def start(self) -> None:
        self.watch = asyncio.create_task(self._watch_members())

    async def close(self) -> None:
        """Raises the exception that the watch died of, if it did."""
        self.watch.cancel()
        watch, *_ = await asyncio.gather(self.watch, *(member.client.close() for member in self._members),
                                         return_exceptions=True)
        if isinstance(watch, Exception):
            raise watch

    async def generate(self, input_ids: Sequence[int], *, rid: str, sampling: SamplingParams,
                       tally: Tally, routed_layers: RoutedLayers | None = None) -> GenerateResult:
        """Sends the request to the serving engine with the fewest requests, again if it fails; the result.

        FleetError after 1 + rollout.retries failed attempts, or if no engine serves or has room for wait_timeout_s, or
        at once if an engine refuses the request itself. An engine without room costs no attempt. Cancelling aborts the
        request at the engine; tokens that it had sampled count as delivered.
        """
        async def ask(client: EngineClient, attempt: str) -> GenerateResult:
            result = await client.generate(input_ids, rid=attempt, sampling=sampling, routed_layers=routed_layers,
                                           timeout_s=self._config.request_timeout_s)
            tally.delivered_tokens += len(result.output_ids)
            return result

        return await self._answered(tuple(input_ids), rid, tally, ask, partial(self._check, sampling=sampling))

    async def input_logprobs(self, input_ids: Sequence[int], *, rid: str, tally: Tally,
                             top_k: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
        """EngineClient.top_input_logprobs of some engine; with top_k=0 (input_logprobs, None).

        Failures are as in generate().
        """
        async def ask(client: EngineClient, attempt: str) -> tuple[np.ndarray, np.ndarray | None]:
            if top_k:
                return await client.top_input_logprobs(input_ids, rid=attempt, top_k=top_k)
            return await client.input_logprobs(input_ids, rid=attempt), None

        return await self._answered(tuple(input_ids), rid, tally, ask, lambda result, attempt, oldest: None)

    async def _answered[R](self, about: tuple[int, ...], rid: str, tally: Tally, ask: Ask[R], check: Check[R]) -> R:
        """The answer of some engine that passes `check`. about: the input of the request."""
        wait_s, sent, failed, refused_since = self._config.engine.wait_timeout_s, 0, 0, None
        async with self._slots:
            while failed <= self._config.retries:
                member = await self._choose(rid)
                try:
                    # SGLang aborts every id that starts with the one given: the full stop ends it
                    result = await self._attempt(member, about, f"{rid}-{sent}.", ask, check)
                except EngineBusyError as error:
                    refused_since = refused_since or time.monotonic()
                    if time.monotonic() - refused_since > wait_s:
                        raise FleetError(f"request {rid}: no engine had room for it for rollout.engine.wait_timeout_s="
                                         f"{wait_s:g}: {error}") from error
                else:
                    if result is not None:
                        return result
                    failed, refused_since = failed + 1, None
                sent += 1
                tally.retries += 1
        raise FleetError(f"request {rid}: no response after {1 + self._config.retries} attempts (rollout.retries="
                         f"{self._config.retries}); {self.describe()}")

    def describe(self) -> str:
        return "; ".join(member.describe(self._version) for member in self._members)

    @property
    def serving(self) -> int:
        """Engines that answer, hold the newest weights and are not in quarantine."""
        return sum(member.reachable and member.version == self._version and not member.quarantined
                   for member in self._members)

    def take_queue_mean(self) -> float | None:
        """Mean number of requests that waited inside an engine since the last call; None if the watch did not check."""
        seen, self._queues = self._queues, []
        return sum(seen) / len(seen) if seen else None

    def client(self, url: str) -> EngineClient:
        (member,) = self._named([url])
        return member.client

    def answering(self) -> list[str]:
        return [member.client.base_url for member in self._members if member.reachable]

    def behind(self) -> list[str]:
        """URLs of engines that answer but do not hold the newest weights, and are not resting."""
        if self._version is None:
            return []
        return [member.client.base_url for member in self._members
                if member.reachable and not member.updating and member.version != self._version
                and not member.resting]

    def updating(self, version: int, urls: Sequence[str]) -> None:
        """A publish of `version` to these engines begins: they are not judged until it ends."""
        self._upcoming = version
        for member in self._named(urls):
            member.begin_update()

    def published(self, version: int, urls: Sequence[str], failures: dict[str, str]) -> None:
        """A publish ended. The engines at `urls` hold `version` and have proven it; what the others hold is unknown.

        What those were working on goes elsewhere.
        """
        self._version = version
        for member in self._named(urls):
            member.end_update(version)
        for url, why in failures.items():
            (member,) = self._named([url])
            member.fail_update(why)

    def emptied(self, urls: Sequence[str]) -> None:
        """These engines gave their weights away: they serve nothing until the next publish has reached them."""
        for member in self._named(urls):
            member.version = None

    def _named(self, urls: Sequence[str]) -> list[Member]:
        return [member for member in self._members if member.client.base_url in urls]

    async def _choose(self, rid: str) -> Member:
        """The serving engine with the fewest requests; waits while there is none. Those that are full do serve."""
        deadline = time.monotonic() + self._config.engine.wait_timeout_s
        while True:
            ready = self._ready()
            if ready:
                return min(ready, key=lambda member: member.in_flight)
            if any(member.version == self._version and member.full for member in self._members):
                deadline = time.monotonic() + self._config.engine.wait_timeout_s
            if time.monotonic() > deadline:
                raise FleetError(f"request {rid}: no engine served for rollout.engine.wait_timeout_s="
                                 f"{self._config.engine.wait_timeout_s:g}; {self.describe()}")
            await asyncio.sleep(CHOICE_POLL_S)

    def _ready(self) -> list[Member]:
        return [member for member in self._members if member.version == self._version and member.free]

    async def _attempt[R](self, member: Member, about: tuple[int, ...], rid: str, ask: Ask[R],
                          check: Check[R]) -> R | None:
        """The result, or None if the engine failed; its Member then records the failure. EngineBusyError if the engine
        has no room."""
        began, oldest, lost = time.monotonic(), self._version, member.gone
        request = asyncio.create_task(ask(member.client, rid))
        gone = asyncio.create_task(lost.wait())
        member.in_flight += 1
        try:
            await asyncio.wait({request, gone}, return_when=asyncio.FIRST_COMPLETED)
            while request.done() and member.updating:
                await asyncio.sleep(CHOICE_POLL_S)
            if lost.is_set() or not request.done():
                raise EngineHTTPError(f"{member.client.base_url} was lost during request {rid}")
            result = await request
            check(result, rid, oldest)
        except asyncio.CancelledError:
            await self._abort(member, rid, request)
            raise
        except RequestRefusedError as error:  # the request's fault: the engine is as good as before
            raise FleetError(f"request {rid} can never succeed: {error}") from error
        except EngineBusyError as error:
            member.refused(str(error))
            raise
        except EngineHTTPError as error:
            member.failed(str(error), began=began, about=about)
            if isinstance(error, EngineDisconnectedError | EngineUnreachableError):
                member.unanswered_since = member.unanswered_since or time.monotonic()
            if isinstance(error, EngineUnreachableError):
                member.lost()
            elif member.reachable:
                await self._abort(member, rid, request)
            return None
        finally:
            member.in_flight -= 1
            request.cancel()
            gone.cancel()
        member.succeeded()
        for other in self._members:  # an input that can be answered is no excuse for those that failed with it
            if other.failed_with:
                other.failed_with.discard(about)
        return result

    def _check(self, result: GenerateResult, rid: str, oldest: int | None, *, sampling: SamplingParams) -> None:
        """Raises EngineHTTPError for an abort that was not ours, for too few or too many tokens, and for weights that
        were not current."""
        if result.finish is Finish.ABORT:
            raise EngineHTTPError(f"the engine aborted request {rid}: {dict(result.finish_detail)}")
        if not 1 <= len(result.output_ids) <= sampling.max_new_tokens:
            raise EngineHTTPError(f"request {rid} has {len(result.output_ids)} tokens; 1 to {sampling.max_new_tokens} "
                                  "were asked for")
        versions = [span.version for span in result.weight_versions]
        if oldest is not None and not all(oldest <= version <= self._upcoming for version in versions):
            raise EngineHTTPError(f"request {rid} was sampled by weights {versions}; current were {oldest} to "
                                  f"{self._upcoming}")

    async def _abort(self, member: Member, rid: str, request: asyncio.Task) -> None:
        """Spares the engine work that nobody waits for.

        Waits for the tokens that it had sampled, because they count.
        """
        with contextlib.suppress(EngineHTTPError):
            await member.client.abort(rid)
        await asyncio.wait({request}, timeout=ABORT_GRACE_S)

    async def _watch_members(self) -> None:
        while True:
            await self._look_around()
            await asyncio.sleep(self._config.engine.health_interval_s)

    async def _look_around(self) -> None:
        await asyncio.gather(*(self._look_at(member) for member in self._members if not member.updating))

    async def _look_at(self, member: Member) -> None:
        """Asks one engine for its label. A server that is stopped or gone does not answer."""
        began, updates, hang_s = time.monotonic(), member.updates, self._config.engine.hang_timeout_s
        try:
            label = await member.client.weight_version(timeout_s=min(PROBE_TIMEOUT_S, hang_s))
        except EngineHTTPError as error:
            member.unanswered_since = member.unanswered_since or began
            hangs = time.monotonic() - member.unanswered_since >= hang_s
            if member.reachable and (hangs or isinstance(error, EngineUnreachableError)):
                member.last_failure = str(error)
                member.lost()
            return
        if updates != member.updates:
            return
        if not member.heard(began):
            return
        if not member.reachable:
            member.found()
        if self._version is not None and label != member.version:
            member.version = None
            return
        with contextlib.suppress(EngineHTTPError):  # it counts for nothing but the metric
            self._queues.append(await member.client.waiting_requests(timeout_s=min(PROBE_TIMEOUT_S, hang_s)))
