"""Claim: C3PO's steps all train on the same number of tokens and take almost the same time; GRPO's do neither.

The same rollouts, lengths lognormal with a heavy tail, are cut for C3PO at Phi and taken whole for GRPO. Phi is the
least that any step of the run has, so that both objectives see the same rollouts and no step is under-full. What
C3PO leaves to vary: the prompts of the responses it takes (the row of all tokens), and attention, which costs more for
longer responses (the row of FLOPs). The longest response, 1,024 tokens, is 0.4 of the length at which attention costs
this model as much as everything else; for Ling-lite at the report's 24,576 tokens that is 0.6.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks import workload
from benchmarks.common import Row, interleaved, main, median, variation


def measure(*, quick: bool, steps: int) -> tuple[list[Row], dict]:
    workload.set_environment()
    from megatron_rl import topology
    from megatron_rl.batch import assemble
    from megatron_rl.config.schema import ParallelConfig
    from megatron_rl.model.architectures import read_config
    from megatron_rl.observe.flops import train_flops
    from megatron_rl.observe.timing import Timers
    from megatron_rl.trainer.learner import PolicyLearner

    steps, responses, typical, longest = (3, 16, 24, 96) if quick else (steps, 32, 200, 1024)
    model = workload.TINY_MOE if quick else workload.SMALL_MOE
    groups = []
    for step in range(steps):
        lengths = workload.response_lengths(responses, median=typical, spread=1.0, longest=longest, seed=step)
        groups.append(workload.rollout_groups(lengths, responses_per_prompt=8, vocab=model["vocab_size"],
                                              prompt_tokens=(8, 16), seed=step))
    available = [sum(rollout.response_tokens for group in each for rollout in group.rollouts) for each in groups]
    phi = min(available)
    here = topology.start(ParallelConfig(), seed=0)
    seconds, tokens, positions, flops = ({"c3po": [], "grpo": []} for _ in range(4))
    with tempfile.TemporaryDirectory() as folder:
        path = workload.write_model(Path(folder) / "model", model)
        config = asdict(read_config(path))
        learners, configs = {}, {}
        for objective in seconds:
            configs[objective] = workload.train_config(path, objective=objective, phi=phi, longest=longest,
                                                       tokens_per_microbatch=4096, parallel=ParallelConfig())
            learners[objective] = PolicyLearner(configs[objective], here)
        for step in range(steps):
            batches = {name: assemble(groups[step], configs[name].algo, dp=1, seed=0, step=step,
                                      max_response_tokens=longest) for name in learners}
            shards = {name: workload.shard_of(learners[name], batches[name]) for name in learners}
            timed = interleaved({name: lambda name=name, shards=shards: learners[name].learn(shards[name], Timers())
                                 for name in learners}, repeats=1 if quick else 3, warmup=int(step == 0))
            for name, (batch,) in batches.items():
                seconds[name].append(min(timed[name]))
                tokens[name].append(batch.selection.selected_tokens)
                lengths = [len(sample.token_ids) - 1 for sample in batch.samples]
                positions[name].append(sum(lengths))
                flops[name].append(train_flops(config, lengths))
    topology.stop()
    rate = {name: np.array(tokens[name]) / np.array(seconds[name]) for name in seconds}
    steady = {name: float(np.percentile(rate[name], 5) / np.median(rate[name])) for name in rate}
    rows = [
        Row("determinism: training tokens per step, CV (C3PO)", variation(tokens["c3po"]), None, "", 0.0),
        Row("determinism: training tokens per step, CV (GRPO)", variation(tokens["grpo"])),
        Row("determinism: all tokens, prompts too, CV against GRPO's", variation(positions["c3po"]),
            variation(positions["grpo"])),
        Row("determinism: FLOPs per step, CV against GRPO's", variation(flops["c3po"]), variation(flops["grpo"]), ""),
        Row("determinism: seconds per step, CV against GRPO's", variation(seconds["c3po"]), variation(seconds["grpo"]),
            "", None if quick else 0.2),
        Row("determinism: tokens/s, 5th percentile over median", steady["c3po"], steady["grpo"], ""),
    ]
    details = {"phi": phi, "steps": steps, "responses_per_step": responses, "tokens": tokens, "positions": positions,
               "flops": flops, "seconds": seconds,
               "median_seconds": {name: median(values) for name, values in seconds.items()}}
    return rows, details


if __name__ == "__main__":
    main("c3po_step_determinism", measure, steps=24)
