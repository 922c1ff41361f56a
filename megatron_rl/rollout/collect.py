"""Groups of K judged responses to each prompt, from one or more engines.

One request per response: it has its own seed and is graded while others still run. A request that fails is
sent again with the same seed and a new `attempt` in its id, so that no response is counted twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.rollout.client import EngineClient, EngineHTTPError, GenerateResult, SamplingParams
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score

RETRY_PAUSE_S = 0.25


class CollectError(RuntimeError):
    """A response could not be had after all retries. Names the prompt, the engine and its log."""


class Tokenizer(Protocol):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


class Scorer(Protocol):
    async def score(self, prompt: Prompt, response_text: str) -> Score: ...


@dataclass(frozen=True)
class SamplingPlan:
    """How many responses each prompt gets and how they are sampled; evaluation uses another than training.

    routed_layers: ask the engine for the experts that each token took.
    """

    samples_per_prompt: int
    temperature: float
    top_p: float
    max_response_tokens: int
    stop: tuple[str, ...] = ()
    routed_layers: RoutedLayers | None = None

    @classmethod
    def from_config(cls, config: RolloutConfig, routed_layers: RoutedLayers | None = None) -> SamplingPlan:
        return cls(
            samples_per_prompt=config.responses_per_prompt,
            temperature=config.temperature,
            top_p=config.top_p,
            max_response_tokens=config.max_response_tokens,
            stop=config.stop,
            routed_layers=routed_layers,
        )


@dataclass(frozen=True)
class Progress:
    """How far one collect() has come. tokens counts response tokens of finished responses."""

    responses: int
    total_responses: int
    tokens: int


def sampling_seed(run_seed: int, tag: str, step: int, prompt_index: int, sample: int) -> int:
    """A seed in [0, 2**63) that depends on every argument and on nothing else."""
    key = f"{run_seed}/{tag}/{step}/{prompt_index}/{sample}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


class Collector:
    """Samples and judges. Safe to reuse for many steps; the engines' weights may change between calls."""

    def __init__(
        self, clients: Sequence[EngineClient], config: RolloutConfig, tokenizer: Tokenizer, scorer: Scorer, *,
        seed: int, eos_token_id: int, on_progress: Callable[[Progress], None] | None = None,
        routed_layers: RoutedLayers | None = None,
    ):
        if not clients:
            raise ValueError("rollout.engine.urls is empty: a collector needs at least one engine")
        self._clients = tuple(clients)
        self._config = config
        self._tokenizer = tokenizer
        self._scorer = scorer
        self._seed = seed
        self._eos_token_id = eos_token_id
        self._on_progress = on_progress
        self._training_plan = SamplingPlan.from_config(config, routed_layers)

    def collect_blocking(
        self, prompts: Sequence[Prompt], *, step: int, first_index: int = 0, tag: str = "train",
        plan: SamplingPlan | None = None,
    ) -> list[RolloutGroup]:
        """collect() for callers without an event loop."""

        async def collect_and_close() -> list[RolloutGroup]:
            try:
                return await self.collect(prompts, step=step, first_index=first_index, tag=tag, plan=plan)
            finally:
                await asyncio.gather(*(client.close() for client in self._clients))

        return asyncio.run(collect_and_close())

    async def collect(
        self, prompts: Sequence[Prompt], *, step: int, first_index: int = 0, tag: str = "train",
        plan: SamplingPlan | None = None,
    ) -> list[RolloutGroup]:
        """One group per prompt, in the order of `prompts`, each with plan.samples_per_prompt responses.

        Seeds follow from (run seed, tag, step, place in the step, sample); `first_index` is the place of the
        first prompt, for a step that collects in several rounds. Raises ValueError for a prompt too long for
        the engine, CollectError when retries run out; then every other request has been cancelled.
        """
        plan = plan or self._training_plan
        for prompt in prompts:
            self._check_length(prompt, plan)
        run = _Run(self, plan, tag, step, total_responses=len(prompts) * plan.samples_per_prompt)
        tasks = [
            asyncio.create_task(run.one_response(prompt, first_index + offset, sample))
            for offset, prompt in enumerate(prompts)
            for sample in range(plan.samples_per_prompt)
        ]
        try:
            judged = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        groups = []
        for offset, prompt in enumerate(prompts):
            mine = judged[offset * plan.samples_per_prompt : (offset + 1) * plan.samples_per_prompt]
            rollouts, texts, scores = zip(*mine, strict=True)
            groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts, texts=texts, scores=scores))
        return groups

    def _check_length(self, prompt: Prompt, plan: SamplingPlan) -> None:
        limit = self._config.max_context_tokens
        if len(prompt.token_ids) + plan.max_response_tokens > limit:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, which with "
                f"rollout.max_response_tokens={plan.max_response_tokens} exceeds rollout.max_context_tokens={limit}"
            )


class _Run:
    """The state of one collect()."""

    def __init__(self, collector: Collector, plan: SamplingPlan, tag: str, step: int, *, total_responses: int):
        self._collector = collector
        self._plan = plan
        self._tag = tag
        self._step = step
        self._total_responses = total_responses
        self._responses = 0
        self._tokens = 0
        self._slots = asyncio.Semaphore(collector._config.concurrency)

    async def one_response(self, prompt: Prompt, index: int, sample: int) -> tuple[Rollout, str, Score]:
        async with self._slots:
            result = await self._generate(prompt, index, sample)
        text = self._collector._tokenizer.decode(result.output_ids.tolist(), skip_special_tokens=True)
        score = await self._collector._scorer.score(prompt, text)
        self._responses += 1
        self._tokens += len(result.output_ids)
        if self._collector._on_progress is not None:
            self._collector._on_progress(Progress(self._responses, self._total_responses, self._tokens))
        return to_rollout(prompt, result), text, score

    async def _generate(self, prompt: Prompt, index: int, sample: int) -> GenerateResult:
        """The first attempt that finishes by itself; a retry goes to the next engine."""
        collector, plan = self._collector, self._plan
        sampling = SamplingParams(
            temperature=plan.temperature,
            max_new_tokens=plan.max_response_tokens,
            top_p=plan.top_p,
            seed=sampling_seed(collector._seed, self._tag, self._step, index, sample),
            stop=plan.stop,
            stop_token_ids=(collector._eos_token_id,),
        )
        attempts = 1 + collector._config.retries
        for attempt in range(attempts):
            client = collector._clients[(index + attempt) % len(collector._clients)]
            rid = f"{self._tag}-{self._step}-{index}-{prompt.id}-{sample}-{attempt}"
            try:
                result = await client.generate(
                    prompt.token_ids, rid=rid, sampling=sampling, timeout_s=collector._config.request_timeout_s,
                    routed_layers=plan.routed_layers)
                if result.finish is not Finish.ABORT:
                    return result
                failure: Exception = EngineHTTPError(f"the engine aborted request {rid}: {result.finish_detail}")
            except asyncio.CancelledError:
                await _abort(client, rid)
                raise
            except EngineHTTPError as error:
                await _abort(client, rid)
                failure = error
            if attempt + 1 < attempts:
                await asyncio.sleep(RETRY_PAUSE_S * 2**attempt)
        log = "its log is on the machine that runs it" if client.log_path is None else f"log: {client.log_path}"
        raise CollectError(
            f"prompt {prompt.id!r}, sample {sample}: no response after {attempts} attempts "
            f"(rollout.retries={collector._config.retries}); last engine {client.base_url}, {log}: {failure}"
        ) from failure


async def _abort(client: EngineClient, rid: str) -> None:
    """Spares the engine work that nobody waits for; an engine that cannot be reached does none."""
    with contextlib.suppress(EngineHTTPError):
        await client.abort(rid)


def to_rollout(prompt: Prompt, result: GenerateResult) -> Rollout:
    """Prompt and response as one sequence; log-probabilities are 0 on the prompt."""
    prompt_tokens, response_tokens = len(prompt.token_ids), len(result.output_ids)
    assert response_tokens > 0, "an engine that finished has sampled at least one token"
    assert result.weight_versions[-1].end == response_tokens, (result.weight_versions, response_tokens)
    return Rollout(
        token_ids=np.concatenate([np.asarray(prompt.token_ids, dtype=np.int32), result.output_ids]),
        trainable=np.arange(prompt_tokens + response_tokens) >= prompt_tokens,
        rollout_logprobs=np.concatenate([np.zeros(prompt_tokens, dtype=np.float32), result.logprobs]),
        finish=result.finish,
        weight_versions=result.weight_versions,
        routed_experts=result.routed_experts,
    )
