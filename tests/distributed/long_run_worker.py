"""Optimiser steps of the real learner on judged responses made up here, some spoilt on purpose, for test_long_run.py.

Ranks of `python -m tests.distributed.long_run_worker CONFIG.json`. Rank 0 writes <run.dir>/steps.pt: the
weights before the first step and after each, whether it was skipped, and on every rank whether a moment changed.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_rl import topology
from megatron_rl.batch import StepBatch, assemble
from megatron_rl.config.load import from_json
from megatron_rl.handoff import UpdateShard, cut_into_shards
from megatron_rl.observe.timing import Timers
from megatron_rl.trainer.learner import PolicyLearner
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score, VersionSpan

STEPS, SPOILT_STEP, SPOILT_PLACE, BROKEN_STEP = 6, 3, 2, 5
"""Step 3 gets an advantage of infinity in one response, step 5 a weight that is NaN, put right after it."""
PROMPTS, RESPONSES, VOCABULARY = 4, 3, 64


def step_batch(config, step: int) -> StepBatch:
    rng = np.random.default_rng([7, step])
    groups = []
    for index in range(PROMPTS):
        rollouts = []
        for _ in range(RESPONSES):
            prompt, length = 4, int(rng.integers(5, 20))
            rollouts.append(Rollout(
                token_ids=rng.integers(0, VOCABULARY, prompt + length).astype(np.int32),
                trainable=np.arange(prompt + length) >= prompt,
                rollout_logprobs=np.where(np.arange(prompt + length) >= prompt, -4.0, 0.0).astype(np.float32),
                finish=Finish.STOP, weight_versions=(VersionSpan(0, 0, length),)))
        scores = tuple(Score(float(value), "correct" if value else "wrong") for value in rng.integers(0, 2, RESPONSES))
        groups.append(RolloutGroup(Prompt(str(index), (1, 2, 3, 4), "q", "a", "math"), tuple(rollouts),
                                   ("",) * RESPONSES, scores))
    batch, = assemble(groups, config.algo, dp=config.parallel.dp, seed=0, step=step,
                      max_response_tokens=config.rollout.max_response_tokens)
    if step == SPOILT_STEP:
        samples = list(batch.samples)
        samples[SPOILT_PLACE] = dataclasses.replace(samples[SPOILT_PLACE], advantage=float("inf"))
        batch = dataclasses.replace(batch, samples=tuple(samples))
    return batch


def shard(config, step: int, learner: PolicyLearner) -> list[UpdateShard]:
    """What this rank trains on in the step."""
    network = dataclasses.asdict(learner.policy.config)
    return cut_into_shards([step_batch(config, step)], config, network)[learner.topology.dp_rank]


def moments(learner: PolicyLearner) -> list[torch.Tensor]:
    return [value.clone() for each in learner.optimizer.chained_optimizers if each.optimizer is not None
            for state in each.optimizer.state.values() for value in state.values()]


def main() -> None:
    config = from_json(sys.argv[1])
    here = topology.start(config.parallel, seed=0)
    learner = PolicyLearner(config, here)

    def weights():
        return {name: tensor.clone() for name, tensor in learner.exporter()}

    report = {"weights": [weights()], "skipped": [], "moments_changed": []}
    norm = learner.policy.gpt_models[-1].decoder.layers[-1].pre_mlp_layernorm.weight
    for step in range(1, STEPS + 1):
        before, kept = moments(learner), norm.data[5].clone()
        if step == BROKEN_STEP:
            norm.data[5] = float("nan")
        result, = learner.learn(shard(config, step, learner), Timers())
        if step == BROKEN_STEP:
            norm.data[5] = kept
        after = moments(learner)
        changed = len(before) != len(after) or not all(map(torch.equal, before, after))
        report["skipped"].append(result.skipped)
        report["moments_changed"].append(here.gather_objects(changed))
        report["weights"].append(weights())
    if here.is_main:
        torch.save(report, Path(config.run.dir) / "steps.pt")
    topology.stop()


if __name__ == "__main__":
    main()
