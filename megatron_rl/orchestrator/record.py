"""Writes a step's story: metrics.jsonl, the held-out evaluation, and whether the run is over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from c3po import SumCount
from megatron_rl import signals
from megatron_rl.batch import BudgetFill, StepBatch
from megatron_rl.config.schema import Config
from megatron_rl.observe import MetricsLog, Timers, reduce_metrics
from megatron_rl.observe.alarm import mismatch_alarm
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.sinks import METRICS
from megatron_rl.observe.timing import PhaseFile
from megatron_rl.observe.verdicts import correctness_metrics
from megatron_rl.orchestrator.evaluation import Evaluator, evaluation_data
from megatron_rl.orchestrator.serving import Serving
from megatron_rl.orchestrator.stages import Stage, plateaued
from megatron_rl.orchestrator.state import OfferedStep
from megatron_rl.orchestrator.weights import PublishedWeights
from megatron_rl.rollout.collectors import Ledger
from megatron_rl.types import Finish, RolloutGroup, StepResult

LENGTH_PERCENTILES = {"p10": 10, "p50": 50, "p90": 90, "max": 100}


class RunRecord:
    """loop.Record."""

    def __init__(self, config: Config, *, log: MetricsLog, evaluator: Evaluator, serving: Serving,
                 weights: PublishedWeights, stage: Stage, phases: PhaseFile):
        self._config, self._log, self._evaluator = config, log, evaluator
        self._serving, self._weights, self._stage, self._phases = serving, weights, stage, phases
        self._rewards: list[float] = []
        if stage.options is not None:
            rows = read_jsonl(log.directory / METRICS)
            self._rewards = [row["reward/mean"] for row in rows if row["step"] > stage.first_step]

    def step(self, step: int, offered: OfferedStep, results: Sequence[StepResult], timers: Timers) -> None:
        metrics = {**offered.metrics, **update_metrics(results), **self._weights.metrics, **self._fleet_metrics()}
        seconds = timers.pop() | {"time/generate": offered.generate_s}
        metrics |= {**seconds, "tokens_per_s/rollout": metrics["rollout/generated_tokens"] / offered.generate_s,
                    "tokens_per_s/train": metrics["budget/selected_tokens"]
                    / (seconds["time/logprobs"] + seconds["time/train"]),
                    "flops/model_tflops_per_s": offered.flops / seconds["time/train"] / 1e12}
        metrics |= mismatch_alarm(step + 1, metrics, self._config.observe.mismatch_alarm)
        if self._stage.options is not None:
            metrics["stage/index"] = self._stage.index
            self._rewards.append(metrics["reward/mean"])
        self._log.log(step + 1, metrics)
        self._log.log_samples(step + 1, offered.samples)

    def _fleet_metrics(self) -> dict[str, float]:
        queue = self._serving.fleet.take_queue_mean()
        return {"rollout/engines_serving": self._serving.fleet.serving,
                **({} if queue is None else {"rollout/engine_queue": queue})}

    async def evaluate(self, step: int, label: str) -> None:
        if not evaluation_data(self._config):
            return
        if label == "after_rl" and not self._stage.is_last:
            label = "during"
        self._phases.write("evaluate")
        values = await self._weights.while_serving(self._evaluator.evaluate(step))
        self._log.log_eval(step, label, values)

    def over(self, step: int) -> bool:
        stage = self._stage.options
        at_plateau = stage is not None and plateaued(self._rewards, stage.plateau_steps, stage.plateau_gain)
        return at_plateau or step == self._config.run.steps

    def stop_asked(self) -> bool:
        return signals.stop_asked()


def ledger_metrics(ledger: Ledger, rounds: int) -> dict[str, float]:
    """The metrics of one step's account of sampled tokens."""
    return {"budget/collect_rounds": rounds,
            "rollout/generated_tokens": ledger.generated_tokens, "rollout/dropped_tokens": ledger.dropped_tokens,
            "rollout/dropped_responses": ledger.dropped_responses, "rollout/carried_tokens": ledger.carried_tokens,
            "rollout/carried_responses": ledger.carried_responses, "rollout/retries": ledger.retries}


def rollout_metrics(groups: Sequence[RolloutGroup], fill: BudgetFill, *, version: int) -> dict[str, float]:
    """version: the version of the policy that trains on them; staleness counts back from it."""
    rollouts = [rollout for group in groups for rollout, score in zip(group.rollouts, group.scores, strict=True)
                if not score.failed]
    scores = [score for group in groups for score in group.scores]
    added: dict[str, list[float]] = {}
    for group in groups:
        for name, values in fill.shaped(group).items():
            added.setdefault(name, []).extend(
                value for value, score in zip(values.tolist(), group.scores, strict=True) if not score.failed)
    unshaped = [score.value for score in scores if not score.failed]
    lengths = [rollout.response_tokens for rollout in rollouts]
    statuses = {status: sum(score.status == status for score in scores) for status in {s.status for s in scores}}
    ages = [(version - span.version, span.end - span.start)
            for rollout in rollouts for sequence in rollout.sequences for span in sequence.weight_versions]
    return {
        "reward/mean": float(np.mean(np.sum([unshaped, *added.values()], axis=0))),
        "reward/unshaped_mean": float(np.mean(unshaped)),
        **{f"reward/shaping/{name}": float(np.mean(values)) for name, values in added.items()},
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
    """Token means over all optimiser steps. Gauges: totals add up, maxima stay maxima, others are averaged."""
    totals = ("train/selected_tokens", "train/skipped_steps")
    sums: dict[str, SumCount] = {}
    for result in results:
        for key, value in result.sums.items():
            sums[key] = sums[key] + value if key in sums else value
    gauges = {key: [result.gauges[key] for result in results] for key in results[0].gauges}
    combined = {key: sum(values) if key in totals else float(np.max(values)) if "max_abs" in key
                else float(np.mean(values)) for key, values in gauges.items()}
    return {**reduce_metrics(sums, None), **combined}
