"""Requests in slices whose tokens a collector grants: an answer may begin in one step and end in a later one.

Whoever asked waits in the same call of generate() until the answer is whole, across steps and weights. Nothing else
tells it that its answer was interrupted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.rollout.fleet import Fleet, Tally
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.rollout.sampling import GenerateResult, SamplingParams
from megatron_rl.rollout.transcript import grown, joined
from megatron_rl.types import Finish, VersionSpan


class Allowance:
    """Tokens that may be sampled until the round ends. Who finds none waits, first come, first served.

    spent: set while no token is left and no slice is under way.
    """

    def __init__(self, slice_tokens: int):
        self._slice_tokens = slice_tokens
        self._left, self._running = 0, 0
        self._turn, self._any_left = asyncio.Lock(), asyncio.Event()
        self.spent = asyncio.Event()
        self.spent.set()

    @property
    def left(self) -> int:
        return self._left

    def grant(self, tokens: int) -> None:
        """A round begins; what an earlier one left is gone."""
        self._add(tokens - self._left)

    async def take(self, most: int) -> int:
        """1 to `most` tokens, which are not left any more."""
        async with self._turn:
            await self._any_left.wait()
            taken = min(most, self._slice_tokens, self._left)
            self._running += 1
            self._add(-taken)
            return taken

    def settle(self, unused: int) -> None:
        """A slice has ended."""
        self._running -= 1
        self._add(unused)

    def _add(self, tokens: int) -> None:
        self._left += tokens
        for event, holds in ((self._any_left, self._left > 0), (self.spent, not self._left and not self._running)):
            event.set() if holds else event.clear()


class Slices:
    """One response's requests, in slices of an allowance that all responses of a round share.

    sampled: tokens of all its slices so far. waited_s: how long its requests have waited for an allowance.
    """

    def __init__(self, allowance: Allowance):
        self._allowance = allowance
        self.sampled = 0
        self._waiting, self._since, self._waited_s = 0, 0.0, 0.0

    @property
    def waited_s(self) -> float:
        return self._waited_s + (time.monotonic() - self._since if self._waiting else 0.0)

    async def generate(self, fleet: Fleet, input_ids: Sequence[int], *, rid: str, sampling: SamplingParams,
                       tally: Tally, routed_layers: RoutedLayers | None = None) -> GenerateResult:
        """What fleet.generate gives; later slices read what earlier ones sampled. FleetError as there."""
        assert not sampling.stop, "a stop text that a slice cuts in two would not be seen"
        whole: GenerateResult | None = None
        while True:
            had = 0 if whole is None else len(whole.output_ids)
            taken, got = await self._take(sampling.max_new_tokens - had), 0
            try:
                read = input_ids if whole is None else [*input_ids, *whole.output_ids.tolist()]
                part = await fleet.generate(read, rid=f"{rid}-{had}", tally=tally, routed_layers=routed_layers,
                                            sampling=replace(sampling, max_new_tokens=taken))
                got = len(part.output_ids)
            finally:
                self.sampled += got
                self._allowance.settle(taken - got)
            whole = part if whole is None else _continued(whole, part)
            if part.finish is not Finish.LENGTH or got < taken or len(whole.output_ids) == sampling.max_new_tokens:
                return whole

    async def _take(self, most: int) -> int:
        self._since = self._since if self._waiting else time.monotonic()
        self._waiting += 1
        try:
            return await self._allowance.take(most)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._waited_s += time.monotonic() - self._since


def _continued(first: GenerateResult, later: GenerateResult) -> GenerateResult:
    """Both as one result; `later` read the prompt and `first`."""
    begin = len(first.output_ids)
    spans = tuple(VersionSpan(span.version, begin + span.start, begin + span.end) for span in later.weight_versions)
    return replace(later, output_ids=np.concatenate([first.output_ids, later.output_ids]),
                   logprobs=np.concatenate([first.logprobs, later.logprobs]),
                   weight_versions=joined(first.weight_versions, spans), cached_tokens=first.cached_tokens,
                   num_retractions=first.num_retractions + later.num_retractions,
                   routed_experts=grown(first.routed_experts, later.routed_experts))
