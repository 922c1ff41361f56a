"""The story of one step of C3PO reinforcement learning; nothing distributed in it.

Every rank runs this loop on the same groups: `rollouts` hands out what rank 0 collected, `learner` trains this
rank's share, `weights` publishes what all ranks hold together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from megatron_rl.batch import StepBatch, assemble, step_budget
from megatron_rl.config.schema import Config
from megatron_rl.observe.failures import bear_failures
from megatron_rl.observe.timing import Timers
from megatron_rl.types import RolloutGroup, StepResult


class Rollouts(Protocol):
    """Judged responses, K per prompt, equal on every rank."""

    def collect(self, step: int, round_: int) -> list[RolloutGroup]: ...

    def state_dict(self) -> dict[str, Any]: ...


class Learner(Protocol):
    """The policy under training."""

    def learn(self, batches: Sequence[StepBatch], timers: Timers) -> list[StepResult]: ...


class Weights(Protocol):
    """Sends the policy's weights to the engines under a version, and proves that they arrived."""

    def publish(self, version: int) -> None: ...


class Record(Protocol):
    """Where a step's story goes: metrics, progress, held-out evaluation, checkpoints."""

    def step(self, step: int, groups: Sequence[RolloutGroup], batches: Sequence[StepBatch],
             results: Sequence[StepResult], timers: Timers) -> None: ...

    def evaluate(self, step: int, label: str) -> None: ...

    def save(self, step: int) -> None: ...

    def over(self, step: int) -> bool:
        """Whether the run, or its stage, ends after `step` steps; the same answer on every rank."""
        ...

    def stop_asked(self) -> bool:
        """Whether the run was asked to end early; the same answer on every rank."""
        ...


def run(config: Config, *, rollouts: Rollouts, learner: Learner, weights: Weights, record: Record,
        timers: Timers, first_step: int) -> bool:
    """Steps first_step .. run.steps - 1; False when it saved and ended early, as asked.

    Version v of the weights is the policy after v rollouts.
    """
    weights.publish(first_step)
    if first_step == 0:
        record.evaluate(0, "before_rl")
    for step in range(first_step, config.run.steps):
        with timers("step"):
            groups, batches = collect_budget(config, rollouts, step, timers)
            results = learner.learn(batches, timers)
            with timers("publish"):
                weights.publish(step + 1)
        record.step(step, groups, batches, results, timers)
        done = step + 1
        over = record.over(done)
        if over or (config.eval.every_steps and done % config.eval.every_steps == 0):
            record.evaluate(done, "after_rl" if over else "during")
        stopping = not over and record.stop_asked()
        if stopping or over or done % config.run.save_every_steps == 0:
            record.save(done)
        if over or stopping:
            return over
    return True


def collect_budget(config: Config, rollouts: Rollouts, step: int,
                   timers: Timers) -> tuple[list[RolloutGroup], list[StepBatch]]:
    """Whole groups until this rollout has what its optimiser steps need (c3po.underfull decides).

    With a budget that is Phi tokens for each step; without one, prompts_per_step groups that dynamic sampling keeps.
    """
    algo, dp = config.c3po, config.parallel.dp
    responses = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    groups: list[RolloutGroup] = []
    for round_ in range(algo.max_collect_rounds):
        with timers("generate"):
            groups += rollouts.collect(step, round_)
        bear_failures(groups, what=f"step {step}", max_fraction=config.rollout.max_failed_fraction)
        if not groups:
            continue  # a budget of sampled tokens may end before the first group has finished
        batches = assemble(groups, algo, dp=dp, seed=config.run.seed, step=step,
                           max_response_tokens=config.rollout.max_response_tokens)
        if algo.has_budget:
            full = all(batch.selection.selected_tokens >= algo.phi_global(dp) for batch in batches)
        else:
            full = not algo.dynamic_sampling or sum(batch.num_responses for batch in batches) >= responses
        if full or algo.underfull != "collect_more":
            return groups, batches
    if groups and not algo.has_budget:
        raise ValueError(f"step {step}: only {sum(batch.num_responses for batch in batches)} of {responses} responses "
                         f"in mixed groups after c3po.max_collect_rounds={algo.max_collect_rounds} rounds; raise it, "
                         "or set c3po.dynamic_sampling=false or c3po.underfull=train_short")
    available = sum(batch.available_tokens for batch in batches) if groups else 0
    raise ValueError(f"step {step}: {available} response tokens after c3po.max_collect_rounds="
                     f"{algo.max_collect_rounds} rounds, {step_budget(algo, dp)} needed for c3po.phi={algo.phi}; raise "
                     "rollout.prompts_per_step or c3po.max_collect_rounds, or lower c3po.phi")
