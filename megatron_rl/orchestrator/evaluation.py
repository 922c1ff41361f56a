"""Evaluates what the engines serve, on a held-out set and on benchmarks, during training or by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rl.config.schema import Config, DataConfig
from megatron_rl.observe.estimators import majority_at_k, pass_at_k, sample_counts
from megatron_rl.observe.failures import bear_failures
from megatron_rl.observe.own import OwnMetrics
from megatron_rl.observe.stats import bootstrap_interval
from megatron_rl.observe.verdicts import judged, known, number_right, right_shares
from megatron_rl.orchestrator.own_evaluations import asker, own_evaluations
from megatron_rl.orchestrator.serving import Serving
from megatron_rl.prompts import heldout_data, prompt_source
from megatron_rl.reward import RewardPool
from megatron_rl.reward.boxed import answer_part, last_boxed
from megatron_rl.rollout.responses import SamplingPlan
from megatron_rl.types import Finish, Prompt, RolloutGroup

__all__ = ["HELD_OUT", "INTERVAL_PREFIX", "Evaluator", "Measured", "evaluation_data", "number_evaluated",
           "summary"]

HELD_OUT = "held-out"
RIGHT = "\0right"  # however it is written; no box holds this
INTERVAL_PREFIX = {"accuracy": ""}
"""The interval of accuracy is low, high; that of any other estimate <name>_low, <name>_high."""


@dataclass(frozen=True)
class EvaluationSet:
    """Problems to evaluate on, and how many responses each gets."""

    name: str
    prompts: list[Prompt]
    samples: int


@dataclass(frozen=True)
class Measured:
    """The judged responses of one set, and what they say (names in docs/metrics.md)."""

    name: str
    groups: list[RolloutGroup]
    values: dict[str, float]


def evaluation_data(config: Config) -> dict[str, DataConfig]:
    """Name -> source of its problems: the held-out set (unless eval.problems=0), then eval.benchmarks."""
    held_out = {HELD_OUT: heldout_data(config)} if config.eval.problems else {}
    return held_out | {name: benchmark.data for name, benchmark in config.eval.benchmarks.items()}


def number_evaluated(config: Config, name: str, available: int) -> tuple[int, str]:
    """(how many problems of the set are evaluated, a line to print if there are fewer than was asked for)."""
    benchmark = config.eval.benchmarks.get(name)
    asked = config.eval.problems if benchmark is None else benchmark.problems or available
    key = "eval.problems" if benchmark is None else f"eval.benchmarks.{name}.problems"
    told = f"{key}={asked}, but the {name} set has {available}: all of them are evaluated"
    return min(asked, available), told if available < asked else ""


class Evaluator:
    """Evaluates the engines' weights on fixed problems. Training, `evaluate` and the quick start use it.

    If evaluation_data is empty, do not ask it.
    """

    def __init__(self, config: Config, serving: Serving, tokenizer, rewards: RewardPool):
        self._config = config
        self._responder = serving.responder(config, tokenizer, rewards)
        self._own = OwnMetrics(config.observe.metrics)
        self._tokenizer = tokenizer
        self._sets = [self._set(name, data, tokenizer, rewards) for name, data in evaluation_data(config).items()]

    def _set(self, name: str, data: DataConfig, tokenizer, rewards: RewardPool) -> EvaluationSet:
        options = self._config.eval
        source = prompt_source(self._config, data, tokenizer, rewards)
        rewards.check_domains(source.domains)
        benchmark = options.benchmarks.get(name)
        count, _ = number_evaluated(self._config, name, len(source))
        samples = benchmark.samples if benchmark and benchmark.samples else options.samples_per_problem
        return EvaluationSet(name, [source.prompt(i) for i in range(count)], samples)

    async def evaluate(self, step: int) -> dict[str, float]:
        """The measurements as one row. Keys of a benchmark begin with its name and a slash.

        Without a held-out set, accuracy and mean_reward are the means over the benchmarks that have them.
        """
        measured = {each.name: each.values for each in await self.measure(step)}
        row = measured.pop(HELD_OUT, None)
        if row is None:
            row = {name: float(np.mean([values[name] for values in measured.values() if name in values]))
                   for name in ("accuracy", "mean_reward") if any(name in values for values in measured.values())}
        row |= {f"{name}/{key}": value for name, values in measured.items() for key, value in values.items()}
        return row | await own_evaluations(self._config.eval, step, lambda path: asker(
            self._responder, self._tokenizer, self._plan(1), path, step))

    def _plan(self, samples: int) -> SamplingPlan:
        options, rollout = self._config.eval, self._config.rollout
        return SamplingPlan(samples_per_prompt=samples, temperature=options.temperature, top_p=options.top_p,
                            max_response_tokens=options.max_response_tokens or rollout.max_response_tokens,
                            stop=rollout.stop)

    async def measure(self, step: int) -> list[Measured]:
        """Samples and judges every set. step: of the served weights; the seeds depend on it."""
        return [await self._measure(one, step) for one in self._sets]

    async def _measure(self, one: EvaluationSet, step: int) -> Measured:
        options, rollout = self._config.eval, self._config.rollout
        plan = self._plan(one.samples)
        started = time.perf_counter()
        tag = "eval" if one.name == HELD_OUT else f"eval-{one.name}"
        groups = await self._responder.groups(one.prompts, step=step, tag=tag, plan=plan)
        bear_failures(groups, what=f"evaluation of {one.name} after step {step}",
                       max_fraction=rollout.max_failed_fraction)
        values = await asyncio.to_thread(summary, groups, resamples=options.bootstrap_resamples, seed=options.seed)
        own = self._own(groups)
        if clash := sorted(own.keys() & {*values, "seconds"}):
            raise ValueError(f"observe.metrics: {', '.join(clash)} is a name of docs/metrics.md; choose another")
        return Measured(one.name, groups, {**values, **own, "seconds": time.perf_counter() - started})


def summary(groups: Sequence[RolloutGroup], *, resamples: int, seed: int) -> dict[str, float]:
    """Accuracy (the share of right responses: avg@n, pass@1), pass@k, maj@k and the mean reward, each with a bootstrap
    interval over problems, and lengths.

    Accuracy, pass@k and maj@k are over the problems whose responses can be called right or not (verdicts.known), and
    absent if there are none. Failed responses have no verdict and count nowhere; pass@k and maj@k are over the problems
    with k verdicts. maj@k needs boxed answers: right ones vote together, however they are written, and others vote by
    the content of their box.
    """
    n, whole = len(groups[0].scores), known(groups)
    scores = [score for group in groups for score in group.scores]
    rollouts = [rollout for group in groups for rollout, score in zip(group.rollouts, group.scores, strict=True)
                if not score.failed]
    values: dict[str, float] = {}

    def put(name: str, by_problem: Sequence[Sequence[float]]) -> None:
        prefix = INTERVAL_PREFIX.get(name, f"{name}_")
        values[name], values[f"{prefix}low"], values[f"{prefix}high"] = bootstrap_interval(by_problem, resamples, seed)

    if whole:
        put("accuracy", right_shares(whole))
    if rollouts:
        put("mean_reward", [[score.value for score in judged(group)] for group in groups if judged(group)])
        values |= {"mean_response_tokens": float(np.mean([each.response_tokens for each in rollouts])),
                   "truncated_fraction": float(np.mean([each.finish is Finish.LENGTH for each in rollouts]))}
    values |= {"problems": len(groups), "samples_per_problem": n,
               "failed_fraction": sum(score.failed for score in scores) / len(scores)}
    votes = [_votes(group) for group in whole]
    boxed = any(vote is not None for vote in sum(votes, []))
    for k in sample_counts(n)[1:]:
        enough = [place for place, group in enumerate(whole) if len(judged(group)) >= k]
        if enough:
            put(f"pass@{k}", [[pass_at_k(len(judged(whole[place])), number_right(whole[place]), k)]
                              for place in enough])
        if enough and boxed and k > 2:
            put(f"maj@{k}", [[majority_at_k(votes[place], k, right=RIGHT, seed=seed)] for place in enough])
    return values


def _votes(group: RolloutGroup) -> list[str | None]:
    """The vote of each judged response."""
    boxes = [last_boxed(answer_part(text, group.prompt.text)) or None for text in group.texts]
    return [RIGHT if box is not None and score.correct else box
            for box, score in zip(boxes, group.scores, strict=True) if not score.failed]
