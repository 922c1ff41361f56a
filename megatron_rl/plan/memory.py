"""Bytes of the fullest rank by kind: what stays through the run, and what comes and goes within a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rl.batch.schedule import plan_microbatches
from megatron_rl.config.schema import Config, ParallelConfig
from megatron_rl.model.network import Network
from megatron_rl.model.slots import count_parameters
from megatron_rl.plan.activations import chunk_bytes, chunks_in_flight, recomputed_bytes
from megatron_rl.plan.parameters import Chunk, stage_chunks
from rl_kernels.linear_logprob.chunked import block_columns

FP32 = 4
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """The pipeline stage that needs most. *_parameters are elements, everything else bytes on one rank."""

    stage: int
    dense_parameters: int
    expert_parameters: int
    num_microbatches: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    logits: int
    publishing: int
    engine: int

    @property
    def stays(self) -> int:
        """Held through the whole run."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.engine

    @property
    def total(self) -> int:
        """The peak: a training pass, or a publish, which comes after it."""
        return self.stays + max(self.activations + self.logits, self.publishing)


def plan_memory(model: Network, config: Config, *, engine_bytes: int = 0) -> MemoryPlan:
    """The plan of the fullest stage for micro-batches at their cap, batch.tokens_per_microbatch."""
    count = expected_microbatches(config)
    return max((plan_stage(model, config, stage, count, engine_bytes) for stage in range(config.parallel.pp)),
               key=lambda plan: plan.total)


def expected_microbatches(config: Config) -> int:
    """Micro-batches per rank and optimiser step if response lengths are uniform up to rollout.max_response_tokens.

    Prompts are taken at half their room. One data-parallel rank's responses (with a budget about phi / dp / mean
    length, without one its share of the rollout) go through the run's own planner (batch/schedule.py).
    """
    algo, rollout, parallel = config.algo, config.rollout, config.parallel
    if algo.has_budget:
        responses = algo.phi_global(parallel.dp) / ((1 + rollout.max_response_tokens) / 2)
    else:
        responses = rollout.prompts_per_step * rollout.responses_per_prompt / algo.updates_per_rollout
    return _expected(max(1, round(responses / parallel.dp)), rollout.max_response_tokens,
                     (rollout.max_context_tokens - rollout.max_response_tokens) // 2,
                     config.batch.tokens_per_microbatch, parallel.cp, parallel.pp if parallel.vpp else 1)


@functools.cache
def _expected(responses: int, longest: int, prompt: int, tokens_per_microbatch: int, cp: int,
              multiple_of: int) -> int:
    lengths = [prompt + math.ceil(longest * (index + 0.5) / responses) for index in range(responses)]
    plan = plan_microbatches(lengths, dp_size=1, cp_size=cp, tokens_per_microbatch=tokens_per_microbatch,
                             multiple_of=multiple_of)
    return len(plan[0])


def plan_stage(model: Network, config: Config, stage: int, num_microbatches: int, engine_bytes: int = 0) -> MemoryPlan:
    """The plan of one rank of pipeline stage `stage`."""
    parallel, element = config.parallel, ELEMENT_BYTES[config.model.dtype]
    chunks = stage_chunks(model, parallel, stage)
    parameters = sum(chunk.num_parameters for chunk in chunks)
    weights, gradients, optimizer = state_bytes(chunks, parallel, element)
    logits = 0
    if chunks[-1].last:
        # linear_logprob: two float32 buffers of a block of logits and, below float32, two in that type; then the
        # weight's gradient, in float32 and as it is handed on. NormHead: the divided head and its gradient
        rows, chunk = model.vocab_size // parallel.tp, config.batch.logprob_chunk_tokens
        wide = FP32 + (0 if element == FP32 else element)
        columns = min(rows, block_columns(chunk, torch.device("cuda")))
        head = wide + 2 * element * model.norm_head
        logits = 2 * chunk * columns * wide + rows * model.hidden_size * head
    return MemoryPlan(
        stage=stage, dense_parameters=sum(sum(chunk.dense) for chunk in chunks),
        expert_parameters=sum(sum(chunk.experts) for chunk in chunks), num_microbatches=num_microbatches,
        weights=weights, gradients=gradients, optimizer=optimizer,
        reference=parameters * element if config.algo.loss.kl_coef > 0 else 0,
        activations=activation_bytes(model, config, stage, num_microbatches), logits=logits,
        publishing=min(config.rollout.bucket_bytes, count_parameters(model)[0] * element), engine=engine_bytes)


def state_bytes(chunks: Sequence[Chunk], parallel: ParallelConfig, element: int) -> tuple[int, int, int]:
    """(weights, gradients, optimiser) of one rank: fp32 gradients, two fp32 moments and, below fp32, fp32 weights.

    The distributed optimiser gives each data-parallel rank an equal share of the moments; experts that have
    groups of their own (ep > 1 or etp != tp, as ColumnParallelLinear decides) are shared among fewer.
    """
    own_groups = parallel.ep > 1 or parallel.etp != parallel.tp
    expert_dp = parallel.world_size // (parallel.ep * parallel.etp * parallel.pp)
    elements = shards = 0
    for chunk in chunks:
        buffers = [(chunk.dense, parallel.dp * parallel.cp), (chunk.experts, expert_dp)] if own_groups \
            else [(chunk.dense + chunk.experts, parallel.dp * parallel.cp)]
        for tensors, ranks in buffers:
            size = padded(tensors, ranks) if parallel.distributed_optimizer else sum(tensors)
            elements += size
            shards += size // ranks if parallel.distributed_optimizer else size
    per_element = 2 * FP32 + (0 if element == FP32 else FP32)
    return elements * element, elements * FP32, shards * per_element


def padded(tensors: Sequence[int], ranks: int) -> int:
    """Elements of a distributed optimiser's buffer: tensors start at multiples of 64, its end divides among ranks.

    megatron-core 0.19.2, optimizer/param_layout.py; one bucket (with parallel.overlap there are more, of 40M
    elements, each padded at its end).
    """
    unit = math.lcm(ranks, 128)
    return math.ceil(sum(math.ceil(size / 64) * 64 for size in tensors) / unit) * unit


def activation_bytes(model: Network, config: Config, stage: int, num_microbatches: int) -> int:
    """At the fullest moment of the schedule, every micro-batch being at its cap."""
    parallel, element = config.parallel, ELEMENT_BYTES[config.model.dtype]
    recompute = config.model.recompute == "full"
    tokens = config.batch.tokens_per_microbatch
    chunks = stage_chunks(model, parallel, stage)
    held = [chunk_bytes(model, parallel, chunk, element=element, recompute=recompute) for chunk in chunks]
    passes = chunks_in_flight(parallel, stage, num_microbatches)
    per_token = sum(held[index // parallel.pp % len(held)] for index in range(passes))  # pp passes of each in turn
    if recompute:
        per_token += max(recomputed_bytes(model, parallel, chunk, element=element) for chunk in chunks)
    return math.ceil(tokens * per_token)
