"""Engines whose every response is known beforehand, on a clock that jumps: for the bookkeeping of collectors only.

A token takes TOKEN_S of virtual time. Response lengths are heavy-tailed and follow from the request's seed, so that
whoever asks in whatever order gets the same response.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.rollout.fleet import Tally
from megatron_rl.rollout.responses import Responder
from megatron_rl.rollout.sampling import GenerateResult, SamplingParams
from megatron_rl.types import Finish, Prompt, Score, VersionSpan

TOKEN_S = 1.0
EOS = 1


class JumpingLoop(asyncio.SelectorEventLoop):
    """Sleeping costs no time: when nothing is ready, the clock moves to the next timer."""

    _now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now = max(self._now, self._scheduled[0]._when)
        super()._run_once()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(coroutine)


def length_of(seed: int, limit: int) -> int:
    """Log-normal, median 16, deviation 1 in the logarithm; at most `limit`."""
    return int(np.clip(16 * np.exp(np.random.default_rng(seed).normal()), 1, limit))


class ScriptedFleet:
    """Stands in for rollout.Fleet. slots: responses under way at a time; failures: share of attempts that break off."""

    def __init__(self, *, limit: int, slots: int = 10**9, failures: float = 0.0, prompt_tokens: int = 1):
        self._limit, self._failures, self._prompt_tokens = limit, failures, prompt_tokens
        self._slots = asyncio.Semaphore(slots)
        self._chance = np.random.default_rng(0)
        self.version = 0
        self.delivered = 0
        self.seeds: set[int] = set()

    async def generate(self, input_ids: Sequence[int], *, rid: str, sampling: SamplingParams,
                       tally: Tally, routed_layers: None = None) -> GenerateResult:
        self.seeds.add(sampling.seed)
        had = len(input_ids) - self._prompt_tokens
        whole = length_of(sampling.seed, self._limit)
        count = min(sampling.max_new_tokens, whole - had)
        assert count > 0, "a finished response was continued"
        async with self._slots:
            while self._chance.random() < self._failures:
                await self._work(int(self._chance.integers(0, count + 1)), tally)
                tally.retries += 1
            await self._work(count, tally)
        ends = had + count == whole
        tokens = response_tokens_of(sampling.seed, whole)[had:had + count]
        return GenerateResult(
            output_ids=tokens, logprobs=-tokens.astype(np.float32), finish=Finish.STOP if ends and whole < self._limit
            else Finish.LENGTH, finish_detail={}, weight_versions=(VersionSpan(self.version, 0, count),),
            cached_tokens=0, num_retractions=0)

    async def _work(self, count: int, tally: Tally) -> None:
        """An abort delivers what was sampled by then."""
        loop = asyncio.get_running_loop()
        began, done = loop.time(), count
        try:
            await asyncio.sleep(count * TOKEN_S)
        except asyncio.CancelledError:
            done = min(int((loop.time() - began) / TOKEN_S), count)
            raise
        finally:
            tally.delivered_tokens += done
            self.delivered += done


def response_tokens_of(seed: int, whole: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 1000, size=whole, dtype=np.int32)


class Decoder:
    def decode(self, token_ids, *, skip_special_tokens: bool) -> str:
        return ",".join(map(str, token_ids))


class ParityScorer:
    """Half of the responses are right, whatever their length."""

    async def score(self, prompt: Prompt, response_text: str) -> Score:
        right = sum(map(int, response_text.split(","))) % 2 == 1
        return Score(float(right), "correct" if right else "wrong")


class Counting:
    """An endless supply of prompts."""

    def __init__(self):
        self._at = 0

    def next(self, n: int) -> list[Prompt]:
        self._at += n
        return [Prompt(str(number), (7,), "", "", "math") for number in range(self._at - n, self._at)]

    def state_dict(self) -> dict:
        return {"at": self._at}

    def load_state_dict(self, state: dict) -> None:
        self._at = state["at"]


def responder(fleet: ScriptedFleet, config: RolloutConfig, *, seed: int = 0) -> Responder:
    return Responder(fleet, config, Decoder(), ParityScorer(), seed=seed, eos_token_id=EOS)


def ks_rejects(sample: Sequence[int], other: Sequence[int]) -> bool:
    """Two-sample Kolmogorov-Smirnov test at level 0.001 (asymptotic critical value 1.949)."""
    grid = np.unique(np.concatenate([sample, other]))
    gap = np.abs(np.searchsorted(np.sort(sample), grid, "right") / len(sample)
                 - np.searchsorted(np.sort(other), grid, "right") / len(other)).max()
    return bool(gap > 1.949 * np.sqrt((len(sample) + len(other)) / (len(sample) * len(other))))
