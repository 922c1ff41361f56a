"""From prompts to what the trainer trains on: collect, assemble, schedule, offer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from megatron_rl.batch import BudgetFill, StepBatch, UnfillableStep, assemble, with_sentences
from megatron_rl.batch.sentences import Pieces
from megatron_rl.config.schema import Config
from megatron_rl.handoff import cut_into_shards, dump, write_shard
from megatron_rl.model.network import Network
from megatron_rl.observe.failures import bear_failures
from megatron_rl.observe.flops import train_flops
from megatron_rl.observe.own import OwnMetrics, show_rollouts
from megatron_rl.observe.samples import sampled_responses
from megatron_rl.observe.timing import Timers
from megatron_rl.observe.verdicts import judged, known, number_right
from megatron_rl.orchestrator.port import TrainerPort
from megatron_rl.orchestrator.record import budget_metrics, ledger_metrics, rollout_metrics
from megatron_rl.orchestrator.state import OfferedStep
from megatron_rl.orchestrator.weights import PublishedWeights
from megatron_rl.rollout.collectors import Collector, Ledger
from megatron_rl.types import Prompt, RolloutGroup


class Rollouts:
    """loop.Rollouts. offered: the step that an orchestrator handed over before it died; it is handed over again.

    counted: what agents did and a judge cost up to a step.
    pieces: gives the text of tokens one by one, from which sentences are found (algo.loss.surrogate=lpo); else None.
    rated: the prompts, if they are drawn by pass rate. They hear of a step's groups when the step has all of them, and
    before the state is taken, so a run that resumes draws what this one would have drawn.
    """

    def __init__(self, config: Config, network: Network, collector: Collector, weights: PublishedWeights,
                 port: TrainerPort, folder: Path, offered: OfferedStep | None = None, *,
                 counted: Callable[[int], Mapping[str, float]], pieces: Pieces | None = None,
                 rated: RatedPrompts | None = None):
        self._config, self._sizes, self._collector = config, asdict(network), collector
        self._weights, self._port, self._folder, self._again = weights, port, folder, offered
        self._own, self._counted = OwnMetrics(config.observe.metrics), counted
        self._pieces, self._rated = pieces, rated
        if offered is not None:
            self._hand_over(offered)

    def keep_state(self, step: int) -> None:
        """Keeps the collector's present state for a checkpoint of `step` steps."""
        self._port.keep_state(step, dump({"collector": self._collector.state_dict()}))

    async def offer(self, step: int, timers: Timers) -> OfferedStep:
        if self._again is not None and self._again.step == step:
            again, self._again = self._again, None
            return again

        async def collect(round_: int) -> tuple[list[RolloutGroup], Ledger]:
            with timers("generate"):
                return await self._weights.while_serving(self._collector.collect(step, round_))

        groups, batches, ledger, rounds = await collect_budget(self._config, collect, step)
        if self._rated is not None:
            for group in known(groups):
                self._rated.observe(group.prompt, number_right(group) / len(judged(group)))
        with timers("assemble"):
            offered = await asyncio.to_thread(self._offered, step, groups, batches, timers, ledger, rounds,
                                              self._counted(step))
            await asyncio.to_thread(offered.write, self._folder)
        self._hand_over(offered)
        return offered

    def _offered(self, step: int, groups: list[RolloutGroup], batches: list[StepBatch], timers: Timers,
                 ledger: Ledger, rounds: int, counted: Mapping[str, float]) -> OfferedStep:
        if self._pieces is not None:
            batches = with_sentences(batches, self._pieces, self._config.algo.sentence_end)
        shards = [write_shard(shard) for shard in cut_into_shards(batches, self._config, self._sizes)]
        lengths = [len(sample.token_ids) - 1 for batch in batches for sample in batch.samples]
        show_rollouts(self._config.observe.rollouts, step, groups)
        config, own = self._config, {f"extra/{name}": value for name, value in self._own(groups).items()}
        fill = BudgetFill(config.algo, config.parallel.dp, config.rollout.max_response_tokens, config.reward.shaping)
        metrics = {**rollout_metrics(groups, fill, version=step), **own, **ledger_metrics(ledger, rounds),
                   **budget_metrics(groups, batches), **counted,
                   **({} if self._rated is None else self._rated.metrics())}
        samples = sampled_responses(groups, config.observe.samples_per_step, seed=config.run.seed, step=step)
        flops = train_flops(self._sizes, lengths, frozen=config.model.lora.on, mtp=config.model.mtp)
        return OfferedStep(step, shards, metrics, samples, flops, timers.seconds("generate"),
                           self._collector.state_dict())

    def _hand_over(self, offered: OfferedStep) -> None:
        self._port.offer(offered.step, offered.shards)
        self._port.keep_state(offered.step + 1, dump({"collector": offered.collector}))


class RatedPrompts(Protocol):
    """data.PassRateSampler, or a mixture of them."""

    def observe(self, prompt: Prompt, rate: float) -> None: ...

    def metrics(self) -> dict[str, float]: ...


class Collect(Protocol):
    def __call__(self, round_: int) -> Awaitable[tuple[list[RolloutGroup], Ledger]]: ...


async def collect_budget(config: Config, collect: Collect | Callable,
                         step: int) -> tuple[list[RolloutGroup], list[StepBatch], Ledger, int]:
    """Collects whole groups until this step has what its optimiser steps need (algo.underfull decides).

    With a budget that is Phi tokens for each optimiser step; without one it is prompts_per_step groups that are not
    left out. Returns (groups, batches, their account, rounds). UnfillableStep after algo.max_collect_rounds.
    """
    algo, dp = config.algo, config.parallel.dp
    responses = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    groups: list[RolloutGroup] = []
    batches: list[StepBatch] = []
    ledger: Ledger | None = None
    for round_ in range(algo.max_collect_rounds):
        more, account = await collect(round_)
        groups, ledger = groups + more, account if ledger is None else ledger.then(account)
        bear_failures(groups, what=f"step {step}", max_fraction=config.rollout.max_failed_fraction)
        if not any(judged(group) for group in groups):
            continue  # all failed; or a budget of sampled tokens ended before the first group had finished
        batches = await asyncio.to_thread(
            assemble, groups, algo, dp=dp, seed=config.run.seed, step=step,
            max_response_tokens=config.rollout.max_response_tokens, shaping=config.reward.shaping)
        if algo.has_budget:
            full = all(batch.is_full for batch in batches)
        else:
            full = not algo.leaves_groups_out or sum(batch.num_responses for batch in batches) >= responses
        if full or algo.underfull != "collect_more":
            return groups, batches, ledger, round_ + 1
    if groups and not batches:
        raise UnfillableStep(f"step {step}: each of {sum(len(group.scores) for group in groups)} responses failed in "
                             f"algo.max_collect_rounds={algo.max_collect_rounds} rounds; the warnings say why")
    if groups and not algo.has_budget:
        raise UnfillableStep(
            f"step {step}: only {sum(batch.num_responses for batch in batches)} of {responses} responses in mixed "
            f"groups after algo.max_collect_rounds={algo.max_collect_rounds} rounds; raise it, or set "
            "algo.dynamic_sampling=false (or algo.hooks.group_filter=null), or algo.underfull=train_short")
    available = sum(batch.available_tokens for batch in batches)
    needed = BudgetFill(algo, dp, config.rollout.max_response_tokens).tokens
    raise UnfillableStep(
        f"step {step}: {available} response tokens after algo.max_collect_rounds={algo.max_collect_rounds} rounds, "
        f"{needed} needed for algo.phi={algo.phi}; raise rollout.prompts_per_step or "
        "algo.max_collect_rounds, or lower algo.phi")
