"""Bytes of the fullest rank by kind: what stays through the run, and what comes and goes within a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rl.batch.schedule import plan_microbatches
from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.optimizer import OFFLOAD_SLICE
from megatron_rl.config.schema import Config, ParallelConfig
from megatron_rl.model.adapters import needs_reference_copy
from megatron_rl.model.architectures import read_config
from megatron_rl.model.backend import resolve
from megatron_rl.model.network import Network
from megatron_rl.model.slots import count_parameters
from megatron_rl.plan.activations import (
    Arithmetic,
    buffer_bytes,
    chunk_bytes,
    chunks_in_flight,
    expert_gradient_bytes,
    fullest_layer,
    head_bytes,
    mtp_bytes,
)
from megatron_rl.plan.parameters import Chunk, mtp_chunk, stage_chunks
from rl_kernels.linear_logprob.chunked import block_columns

FP32 = 4
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """The pipeline stage that needs most. *_parameters are elements (trained_parameters of the two others, which with
    model.lora are the adapters), everything else bytes on one rank.

    activations: kept for the backward passes of the micro-batches in flight. layer: what one layer needs beside them
    while it computes; recomputed: what autograd saves at most beside activations, of a layer or of the one behind the
    last, with model.recompute. logits: what the head needs instead. step: temporaries of the optimiser. host: states
    of the optimiser in host memory, not on the GPU. engine: what colocated engines take of the GPU while the trainer
    does not train.
    """

    stage: int
    dense_parameters: int
    expert_parameters: int
    trained_parameters: int
    num_microbatches: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    layer: int
    logits: int
    step: int
    publishing: int
    engine: int
    recomputed: int
    host: int = 0

    @property
    def stays(self) -> int:
        """Held through the whole run."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> int:
        """The peak: a layer or the head of a training pass, the optimiser's step after it, or engines on the same GPUs,
        which have given their memory back until then: a publish to them, and their sampling. For these the gradients'
        buffers are free (TrainStep.release_gradients)."""
        return self.stays + max(self.activations + max(self.layer, self.logits), self.step,
                                self.publishing + self.engine - (self.gradients if self.engine else 0))


def plan_memory(model: Network, config: Config, *, engine_bytes: int = 0) -> MemoryPlan:
    """The plan of the fullest stage for micro-batches at their cap, batch.tokens_per_microbatch."""
    count = expected_microbatches(config)
    return max((plan_stage(model, config, stage, count, engine_bytes) for stage in range(config.parallel.pp)),
               key=lambda plan: plan.total)


def expected_microbatches(config: Config) -> int:
    """Micro-batches per rank and optimiser step if response lengths are uniform up to rollout.max_response_tokens.

    Prompts are taken at half their room. One data-parallel rank's responses (with a budget about phi / dp / mean
    length, without one its share of the rollout, in SFT its share of sft.batch_size) go through the run's own planner
    (batch/schedule.py).
    """
    algo, rollout, parallel = config.algo, config.rollout, config.parallel
    if config.is_sft:
        responses = float(config.sft.batch_size)
    elif algo.has_budget:
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


def plan_stage(model: Network, config: Config, stage: int, num_microbatches: int, engine_bytes: int = 0, *,
               gpu: bool = True) -> MemoryPlan:
    """The plan of one rank of pipeline stage `stage`. gpu False: as the same step keeps it on a CPU, for tests."""
    parallel, element = config.parallel, ELEMENT_BYTES[config.model.dtype]
    lora = config.model.lora
    how = Arithmetic(element, resolve(config.model, gpu=gpu), gpu, lora, config.model.recompute,
                     config.model.recompute_modules)
    chunks = stage_chunks(model, parallel, stage, lora)
    mtp = [mtp_chunk(model, parallel)] if config.model.mtp else []
    trained = [group for group in (chunks, mtp) if group]  # each with an optimiser of its own
    weights, gradients, optimizer = (
        sum(sizes) for sizes in zip(*(state_bytes(group, parallel, element) for group in trained), strict=True))
    offload = config.offloads_optimizer
    tokens, recompute = config.batch.tokens_per_microbatch, config.model.recompute != "none"
    held = [chunk_bytes(model, parallel, chunk, how) for chunk in chunks]
    passes = chunks_in_flight(parallel, stage, num_microbatches)
    kept = sum(held[index // parallel.pp % len(held)] for index in range(passes))  # pp passes of each in turn
    layers = [fullest_layer(model, parallel, chunk, how) for chunk in chunks]
    recomputed = max(saved for saved, _ in layers)
    buffers = buffer_bytes(model, parallel, how, stage)
    temporaries = max(passing for _, passing in layers) + buffers
    head = 0
    if chunks[-1].last:
        head = logits_bytes(model, config, how) + math.ceil(
            tokens * (buffers + (head_bytes(model, parallel, how) if recompute else 0)))
    layer = recomputed + temporaries
    if mtp:
        behind = mtp_bytes(model, parallel, how)
        if recompute:
            head = max(head, math.ceil(tokens * temporaries)) + math.ceil(tokens * behind)
            recomputed = max(recomputed, behind + head_bytes(model, parallel, how))
        else:
            kept += behind
    return MemoryPlan(
        stage=stage, dense_parameters=sum(sum(chunk.dense) + chunk.frozen[0] for chunk in (*chunks, *mtp)),
        expert_parameters=sum(sum(chunk.experts) + chunk.frozen[1] for chunk in (*chunks, *mtp)),
        trained_parameters=sum(sum(chunk.dense) + sum(chunk.experts) for chunk in (*chunks, *mtp)),
        num_microbatches=num_microbatches,
        weights=weights, gradients=gradients, optimizer=0 if offload else optimizer,
        reference=frozen_parameters(config, chunks, stage) * element,
        activations=math.ceil(tokens * kept),
        layer=math.ceil(tokens * layer) + expert_gradient_bytes(model, parallel, how),
        recomputed=math.ceil(tokens * recomputed), logits=head,
        step=max(step_bytes(group, parallel, element, offload=offload, fused=how.with_te) for group in trained),
        publishing=0 if config.is_sft else min(config.rollout.bucket_bytes, count_parameters(model)[0] * element),
        engine=engine_bytes,
        host=optimizer if offload else 0)


def frozen_parameters(config: Config, chunks: Sequence[Chunk], stage: int) -> int:
    """Parameters of the reference policy and of the teachers that the ranks hold, on one rank of the stage. None of
    these has adapters."""
    if config.is_sft:
        return 0
    reference = config.algo.loss.kl_coef > 0 and needs_reference_copy(config.model)
    own = sum(sum(chunk.frozen) or chunk.num_parameters for chunk in chunks) if reference else 0
    return own + sum(
        chunk.num_parameters for key, folder in config.algo.distillation.checkpoints.items()
        for chunk in stage_chunks(read_config(folder, key=key), config.parallel, stage, LoraConfig()))


def logits_bytes(model: Network, config: Config, how: Arithmetic) -> int:
    """What the head's backward pass holds at its fullest (rl_kernels/linear_logprob).

    It holds two float32 blocks: the logits and their gradient. If the type is narrower than float32, these are the
    gradient and what its first part leaves of it, and two parts in that type. `fused` holds the logits and the two
    parts. Both also hold the gradient of the weight (one block of it in float32), for a NormHead the divided head, and
    the hidden states twice with their float32 gradient.
    """
    rows, chunk, element = model.vocab_size // config.parallel.tp, config.batch.logprob_chunk_tokens, how.element
    tokens, narrow = config.batch.tokens_per_microbatch, element < FP32
    columns = min(rows, block_columns(chunk, torch.device("cuda")))
    fused = how.backend.kernels.logprob == "fused"
    blocks = chunk * columns * ((1 if fused and narrow else 2) * FP32 + 2 * element * narrow)
    gradient = model.hidden_size * (rows * element * (1 + model.norm_head) + columns * FP32 * narrow)
    if config.model.lora.on:  # the head is frozen
        gradient = model.hidden_size * rows * element * model.norm_head
    return blocks + gradient + tokens * model.hidden_size * (2 * element + FP32)


def state_bytes(chunks: Sequence[Chunk], parallel: ParallelConfig, element: int) -> tuple[int, int, int]:
    """(weights, gradients, optimiser) of one rank: fp32 gradients, two fp32 moments and, below fp32, fp32 weights.

    The distributed optimiser gives each data-parallel rank an equal share of the moments; experts that have
    groups of their own (ep > 1 or etp != tp, as ColumnParallelLinear decides) are shared among fewer.
    """
    optimisers = _optimisers(chunks, parallel)
    elements, shards, _ = (sum(sizes) for sizes in zip(*optimisers, strict=True))
    frozen = sum(sum(chunk.frozen) for chunk in chunks)
    return (elements + frozen) * element, elements * FP32, shards * _per_element(element)


def _per_element(element: int) -> int:
    """Bytes of the optimiser's state of one element."""
    return 2 * FP32 + (0 if element == FP32 else FP32)


def step_bytes(chunks: Sequence[Chunk], parallel: ParallelConfig, element: int, *, offload: bool, fused: bool) -> int:
    """What the optimiser's step needs for itself. Those of dense and of expert parameters step one by one.

    Torch's AdamW with foreach, as on a GPU, has temporaries: the roots of all second moments of one optimiser (torch
    2.14.1, optim/adam.py: _multi_tensor_adam). Transformer Engine's FusedAdam (`fused`) has none. With
    optimizer.offload only a slice of the optimiser is there, and its state too (model/host_states.py).
    """
    stepping = max(min(shard, max(OFFLOAD_SLICE, largest)) if offload else shard
                   for _, shard, largest in _optimisers(chunks, parallel))
    return stepping * ((0 if fused else FP32) + (_per_element(element) if offload else 0))


def _optimisers(chunks: Sequence[Chunk], parallel: ParallelConfig) -> list[tuple[int, int, int]]:
    """(elements of its buffers, of this rank's share, of its largest tensor) of the optimiser of each kind of
    parameters."""
    own_groups = parallel.ep > 1 or parallel.etp != parallel.tp
    expert_dp = parallel.world_size // (parallel.ep * parallel.etp * parallel.pp)
    dense_dp = parallel.dp * parallel.cp
    kinds = [([chunk.dense for chunk in chunks], dense_dp), ([chunk.experts for chunk in chunks], expert_dp)] \
        if own_groups else [([chunk.dense + chunk.experts for chunk in chunks], dense_dp)]
    found = []
    for buffers, ranks in kinds:
        sizes = [padded(tensors, ranks) if parallel.distributed_optimizer else sum(tensors) for tensors in buffers]
        found.append((sum(sizes), sum(sizes) // ranks if parallel.distributed_optimizer else sum(sizes),
                      max((size for tensors in buffers for size in tensors), default=0)))
    return found


def padded(tensors: Sequence[int], ranks: int) -> int:
    """Elements of a distributed optimiser's buffer: tensors start at multiples of 64, its end divides among ranks.

    megatron-core 0.19.2, optimizer/param_layout.py; one bucket (with parallel.overlap there are more, of 40M
    elements, each padded at its end).
    """
    unit = math.lcm(ranks, 128)
    return math.ceil(sum(math.ceil(size / 64) * 64 for size in tensors) / unit) * unit
