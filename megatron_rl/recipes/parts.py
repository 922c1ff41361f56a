"""The parts of the RL loop on a cluster: what rank 0 does for all, and what all do together.

Rank 0 alone speaks to engines, judges, logs and evaluates; groups are broadcast, so that every rank goes on
with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict
from typing import Any

import numpy as np

from c3po import SumCount
from megatron_rl.batch import BudgetFill, StepBatch
from megatron_rl.config.schema import Config
from megatron_rl.model.network import Network
from megatron_rl.observe import MetricsLog, Timers, reduce_metrics
from megatron_rl.observe.alarm import mismatch_alarm
from megatron_rl.observe.flops import train_flops
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.own import OwnMetrics
from megatron_rl.observe.samples import sampled_responses
from megatron_rl.observe.sinks import METRICS
from megatron_rl.observe.timing import PhaseFile
from megatron_rl.observe.verdicts import correctness_metrics
from megatron_rl.recipes import stop
from megatron_rl.recipes.evaluation import Evaluator, evaluation_data
from megatron_rl.recipes.routing import without_routed_experts
from megatron_rl.recipes.serving import Serving
from megatron_rl.recipes.stages import Stage, plateaued
from megatron_rl.recipes.weights import PublishedWeights
from megatron_rl.rollout.collectors import Collector, Ledger
from megatron_rl.topology import Topology
from megatron_rl.types import Finish, RolloutGroup, StepResult

CATCH_UP_POLL_S = 0.1
LENGTH_PERCENTILES = {"p10": 10, "p50": 50, "p90": 90, "max": 100}


def while_serving(topology: Topology, weights: PublishedWeights, serving: Serving | None,
                  coroutine: Coroutine[Any, Any, Any] | None) -> Any:
    """Collective: runs rank 0's coroutine on its event loop; its result there, None on ranks that have none.

    An engine that comes back meanwhile gets the current weights from all ranks, which would otherwise only wait.
    """
    running = None if serving is None else serving.background.submit(coroutine)
    try:
        while not topology.broadcast_object(running and _ended(running, serving)):
            weights.catch_up()
    except BaseException:
        if running is not None:
            running.cancel()
        raise
    return None if running is None else running.result()


def _ended(running: Future, serving: Serving) -> bool:
    """True when it is done, which raises what went wrong; False when an engine must catch up first."""
    while not wait([running], timeout=CATCH_UP_POLL_S).done:
        if serving.fleet.behind():
            return False
    running.result()
    return True


class BroadcastRollouts:
    """loop.Rollouts: rank 0 collects, everybody receives. serving and collector are None on other ranks."""

    def __init__(self, topology: Topology, weights: PublishedWeights, serving: Serving | None,
                 collector: Collector | None):
        self._topology, self._weights, self._serving, self._collector = topology, weights, serving, collector
        self._ledger, self._rounds = Ledger(), 0

    def collect(self, step: int, round_: int) -> list[RolloutGroup]:
        collected = while_serving(self._topology, self._weights, self._serving,
                                  self._collector and self._collector.collect(step, round_))
        shared = self._topology.broadcast_object(collected and without_routed_experts(collected[0]))
        if collected is None:
            return shared
        groups, ledger = collected
        self._ledger, self._rounds = self._ledger.then(ledger) if round_ else ledger, round_ + 1
        return groups

    def metrics(self) -> dict[str, float]:
        """The account of the step that was last collected; rank 0 only."""
        ledger, queue = self._ledger, self._serving.fleet.take_queue_mean()
        return {"budget/collect_rounds": self._rounds,
                "rollout/generated_tokens": ledger.generated_tokens, "rollout/dropped_tokens": ledger.dropped_tokens,
                "rollout/dropped_responses": ledger.dropped_responses, "rollout/carried_tokens": ledger.carried_tokens,
                "rollout/carried_responses": ledger.carried_responses, "rollout/retries": ledger.retries,
                "rollout/engines_serving": self._serving.fleet.serving,
                **({} if queue is None else {"rollout/engine_queue": queue})}

    def state_dict(self) -> dict[str, Any]:
        """What rank 0 needs to go on; may hold arrays (the checkpoint pickles it)."""
        return self._collector.state_dict() if self._topology.is_main else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._topology.is_main:
            self._collector.load_state_dict(state)


class RunRecord:
    """loop.Record: metrics, evaluation and checkpoints. log, evaluator and serving are None on all ranks but 0."""

    def __init__(self, config: Config, topology: Topology, *, network: Network, log: MetricsLog | None,
                 evaluator: Evaluator | None, serving: Serving | None, rollouts: BroadcastRollouts,
                 weights: PublishedWeights, save: Callable[[int, bool], None], poll_save: Callable[[], None],
                 stage: Stage):
        self._config, self._topology, self._sizes = config, topology, asdict(network)
        self._log, self._evaluator, self._serving = log, evaluator, serving
        self._own = OwnMetrics(config.observe.metrics)
        self.phases = None if log is None else PhaseFile(log.directory)
        self._rollouts, self._weights = rollouts, weights
        self._save, self._poll_save, self._stage = save, poll_save, stage
        self._plateau, self._rewards = False, []
        if log is not None and stage.options is not None:
            rows = read_jsonl(log.directory / METRICS)
            self._rewards = [row["reward/mean"] for row in rows if row["step"] > stage.first_step]

    def step(self, step: int, groups: Sequence[RolloutGroup], batches: Sequence[StepBatch],
             results: Sequence[StepResult], timers: Timers) -> None:
        seconds = timers.pop()
        self._poll_save()
        if self._log is None:
            return
        fill = BudgetFill(self._config.c3po, self._config.parallel.dp, self._config.rollout.max_response_tokens)
        own = {f"extra/{name}": value for name, value in self._own(groups).items()}
        metrics = {**rollout_metrics(groups, fill, version=step), **own, **self._rollouts.metrics(),
                   **budget_metrics(groups, batches), **update_metrics(results), **self._weights.metrics(), **seconds}
        metrics |= {"tokens_per_s/rollout": metrics["rollout/generated_tokens"] / seconds["time/generate"],
                    "tokens_per_s/train": metrics["budget/selected_tokens"]
                    / (seconds["time/logprobs"] + seconds["time/train"])}
        lengths = [len(sample.token_ids) - 1 for batch in batches for sample in batch.samples]
        flops = train_flops(self._sizes, lengths)
        metrics["flops/model_tflops_per_s"] = flops / seconds["time/train"] / 1e12
        metrics |= mismatch_alarm(step + 1, metrics, self._config.observe.mismatch_alarm)
        if self._stage.options is not None:
            metrics["stage/index"] = self._stage.index
            self._rewards.append(metrics["reward/mean"])
        self._log.log(step + 1, metrics)
        self._log.log_samples(step + 1, sampled_responses(groups, self._config.observe.samples_per_step,
                                                          seed=self._config.run.seed, step=step))

    def evaluate(self, step: int, label: str) -> None:
        if not evaluation_data(self._config):
            return
        if label == "after_rl" and not self._stage.is_last:
            label = "during"
        if self.phases is not None:
            self.phases.write("evaluate")
        values = while_serving(self._topology, self._weights, self._serving,
                               self._evaluator and self._evaluator.evaluate(step))
        if self._log is not None:
            self._log.log_eval(step, label, values)

    def save(self, step: int) -> None:
        self._save(step, self._plateau or step == self._config.run.steps)

    def over(self, step: int) -> bool:
        stage = self._stage.options
        if stage is not None and stage.plateau_steps:
            mine = plateaued(self._rewards, stage.plateau_steps, stage.plateau_gain)
            self._plateau = self._topology.broadcast_object(mine if self._topology.is_main else None)
        return self._plateau or step == self._config.run.steps

    def stop_asked(self) -> bool:
        return any(self._topology.gather_objects(stop.asked()))


def rollout_metrics(groups: Sequence[RolloutGroup], fill: BudgetFill, *, version: int) -> dict[str, float]:
    """version: of the policy that trains on them; staleness counts versions back from it."""
    rollouts = [rollout for group in groups for rollout, score in zip(group.rollouts, group.scores, strict=True)
                if not score.failed]
    scores = [score for group in groups for score in group.scores]
    rewards = [reward for group in groups for reward, score in zip(
        fill.rewards(group.rollouts, group.scores).tolist(), group.scores, strict=True) if not score.failed]
    lengths = [rollout.response_tokens for rollout in rollouts]
    statuses = {status: sum(score.status == status for score in scores) for status in {s.status for s in scores}}
    ages = [(version - span.version, span.end - span.start) for rollout in rollouts for span in rollout.weight_versions]
    return {
        "reward/mean": float(np.mean(rewards)),
        "reward/unshaped_mean": float(np.mean([score.value for score in scores if not score.failed])),
        **correctness_metrics(groups),
        **{f"reward/status/{status}": count / len(scores) for status, count in sorted(statuses.items())},
        "rollout/response_tokens_mean": float(np.mean(lengths)),
        **{f"rollout/response_tokens_{name}": float(np.percentile(lengths, percent))
           for name, percent in LENGTH_PERCENTILES.items()},
        "rollout/staleness_mean": sum(age * tokens for age, tokens in ages) / sum(tokens for _, tokens in ages),
        "rollout/staleness_max": max(age for age, _ in ages),
        "rollout/failed_fraction": sum(score.failed for score in scores) / len(scores),
        "rollout/truncated_fraction": float(np.mean([rollout.finish is Finish.LENGTH for rollout in rollouts])),
    }


def budget_metrics(groups: Sequence[RolloutGroup], batches: Sequence[StepBatch]) -> dict[str, float]:
    """Totals over the optimiser steps of one rollout; fill is selected / Phi."""
    selected = sum(batch.selection.selected_tokens for batch in batches)
    phi = sum(batch.selection.phi for batch in batches)
    available = sum(rollout.response_tokens for group in groups for rollout in group.rollouts)
    return {"budget/phi": phi, "budget/selected_tokens": selected, "budget/fill": selected / phi,
            "budget/dropped_tokens": available - selected}


def update_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    """Token means over all optimiser steps; of the gauges, totals add up, maxima stay maxima, others are averaged."""
    totals = ("train/selected_tokens", "train/skipped_steps")
    sums: dict[str, SumCount] = {}
    for result in results:
        for key, value in result.sums.items():
            sums[key] = sums[key] + value if key in sums else value
    gauges = {key: [result.gauges[key] for result in results] for key in results[0].gauges}
    combined = {key: sum(values) if key in totals else float(np.max(values)) if "max_abs" in key
                else float(np.mean(values)) for key, values in gauges.items()}
    return {**reduce_metrics(sums, None), **combined}
