"""One optimiser step of one rank, phase by phase, under a recorder: the trainer's own parts in the trainer's order.

The same function runs on fake tensors in a world that is not there and on real ones over gloo, so that the two can be
compared (tests/distributed/test_rehearsal.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from c3po import StepTotals
from megatron_rl.batch import pack
from megatron_rl.config.schema import Config
from megatron_rl.model.adam_state import adam_shards
from megatron_rl.model.adapters import needs_reference_copy
from megatron_rl.model.build import Policy, build_policy
from megatron_rl.model.network import Network
from megatron_rl.rehearsal.recorder import Recorder
from megatron_rl.rehearsal.standins import (
    Imbalance,
    after_a_first_step,
    as_on_a_gpu,
    fake_parameters,
    forgotten_loss_scale,
    host_memory,
    known_experts,
    known_sequences,
    shapes_of_neighbours,
)
from megatron_rl.rehearsal.world import one_rank
from megatron_rl.topology import Topology
from megatron_rl.train_step.optimizer import build_mtp_optimizer, build_optimizer, chained, settle
from megatron_rl.train_step.step import TrainStep
from megatron_rl.trainer.learner import frozen_options, needs_old_pass
from megatron_rl.trainer.objective import TokenObjective
from megatron_rl.types import PackedMicrobatch, TrainSample

TOKENS_PER_SENTENCE = 20


@dataclass(frozen=True)
class Workload:
    """Equal micro-batches of one step.

    - lengths: positions of the sequences of one, over all context-parallel ranks.
    - microbatches: how many of them are rehearsed.
    - per_step: how many of them a step of this rank costs as much as.
    """

    lengths: tuple[int, ...]
    microbatches: int
    per_step: float = 1.0


@dataclass(frozen=True)
class Parameters:
    """Elements on one rank. split: dense ones cut over tensor parallelism; whole: dense ones that every tensor-parallel
    rank holds; experts: of the routed experts."""

    split: int
    whole: int
    experts: int


def _named_parameters(policy: Policy) -> list[tuple[str, torch.nn.Parameter]]:
    modules = [*policy.gpt_models, *([] if policy.mtp is None else [policy.mtp])]
    return [named for module in modules for named in module.named_parameters()]


def count_parameters(policy: Policy) -> Parameters:
    split = whole = experts = 0
    for name, parameter in _named_parameters(policy):
        if "local_experts" in name:
            experts += parameter.numel()
        elif getattr(parameter, "tensor_model_parallel", False):  # Megatron sets it on those that it cuts
            split += parameter.numel()
        else:
            whole += parameter.numel()
    return Parameters(split, whole, experts)


@dataclass(frozen=True)
class Rehearsed:
    """What was seen of one rank, `here`."""

    here: Topology
    parameters: Parameters
    recorder: Recorder


def check_rehearsable(config: Config, imbalance: Imbalance = 1.0) -> None:
    """ValueError for what has no stand-in yet, and for more rows than there are."""
    if isinstance(imbalance, float) and not 1.0 <= imbalance <= config.parallel.ep:
        raise ValueError(f"--imbalance {imbalance:g}: between 1 (even experts) and parallel.ep={config.parallel.ep} "
                         "(every row of the group comes to this rank)")
    if config.model.backend == "transformer_engine":
        raise ValueError("model.backend=transformer_engine cannot be rehearsed, its kernels take no fake tensors; "
                         "rehearse model.backend=torch")
    if config.parallel.token_dispatcher != "alltoall":
        raise ValueError(f"parallel.token_dispatcher={config.parallel.token_dispatcher} cannot be rehearsed; "
                         "only alltoall can")
    if config.algo.router_replay != "none":
        raise ValueError(f"algo.router_replay={config.algo.router_replay} cannot be rehearsed; set it to none")
    for key, folder in config.algo.distillation.checkpoints.items():
        raise ValueError(f"{key}={folder}: the pass of a teacher cannot be rehearsed; leave algo.distillation out "
                         "(megatron-rl plan counts the teacher's weights)")


def rehearse(config: Config, network: Network, rank: int, workload: Workload, *, gpu: bool = True,
             imbalance: Imbalance = 1.0) -> Rehearsed:
    """One rank of config.parallel on fake tensors.

    gpu False: with a CPU's attention, norms and blocks.
    """
    check_rehearsable(config, imbalance)
    parallel = config.parallel
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder(fake)
    first = packed(workload, config, 0)[0]
    rows = first.num_tokens // (parallel.tp if parallel.use_sequence_parallel else 1)
    parts = int(first.sentence_ids.max()) + 1 if config.algo.needs_sentences else len(first.spans)
    with (one_rank(rank, parallel, network) as here, fake_parameters(), forgotten_loss_scale(),
          known_experts(recorder.read_by_host, imbalance), known_sequences(recorder.read_by_host, parts),
          shapes_of_neighbours(lambda: [rows, 1, network.hidden_size]),
          host_memory(recorder.on_host), as_on_a_gpu() if gpu else contextlib.nullcontext()):
        batches = packed(workload, config, here.cp_rank)
        with fake, recorder:
            for batch in batches:
                _make_fake(batch, fake)
            policy = run_step(config, network, here, batches, recorder)
            return Rehearsed(here, count_parameters(policy), recorder)


def build_only(config: Config, network: Network, rank: int) -> Parameters:
    """The parameters of one rank, without a step."""
    with one_rank(rank, config.parallel, network), fake_parameters(), FakeTensorMode(allow_non_fake_inputs=True):
        return count_parameters(build_policy(network, config.model, config.parallel, with_gradients=False))


def run_step(config: Config, network: Network, here: Topology, batches: list[PackedMicrobatch],
             recorder: Recorder) -> Policy:
    """Build, score, update; the phases are named in PHASES. As trainer.learner.PolicyLearner does it."""
    algo, parallel = config.algo, config.parallel
    with recorder.phase("build", "weights"):
        policy = build_policy(network, config.model, parallel, with_gradients=True)
        chunks = [*policy.chunks, *([] if policy.mtp_chunk is None else [policy.mtp_chunk])]
        buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        recorder.storages.relabel([buffer.grad_data for buffer in buffers], "gradients")
    if not isinstance(next(policy.gpt_models[0].parameters()), FakeTensor):
        _initialise(policy)
    elif parallel.overlap:
        after_a_first_step(policy.chunks)
    with recorder.phase("build optimiser", "optimiser"):
        optimizer = build_optimizer(policy, config.optimizer, parallel)
        settle(optimizer, policy, offload=config.offloads_optimizer)
        mtp_optimizer = build_mtp_optimizer(policy, config.optimizer, parallel, offload=config.offloads_optimizer)
        together = chained(optimizer, mtp_optimizer)
        for shard in adam_shards(together, [each for _, each in _named_parameters(policy)]).values():
            shard.tensors()  # makes the moments, which a step before this one would have made
    step = TrainStep(policy, optimizer, here, temperature=config.rollout.temperature,
                     chunk_tokens=config.batch.logprob_chunk_tokens, mtp_optimizer=mtp_optimizer)
    reference = None
    if algo.loss.kl_coef > 0 and needs_reference_copy(config.model):
        with recorder.phase("build reference", "reference"):
            reference = build_policy(network, frozen_options(config.model), parallel, with_gradients=False)
    old, refs, counts = None, None, None
    if needs_old_pass(algo, network):
        with recorder.phase("old log-probabilities", "activations"):
            old, counts = step.count_routing(batches)
    if algo.loss.kl_coef > 0:
        with (recorder.phase("reference log-probabilities", "activations"),
              contextlib.nullcontext() if reference is not None else policy.adapters.off()):
            refs = step.logprobs(batches, reference or policy)
    if here.is_last_stage:
        for index, batch in enumerate(batches):
            batch.old_logprobs = None if old is None else old[index]
            batch.ref_logprobs = None if refs is None else refs[index]
    phi = algo.phi_global(parallel.dp) if algo.has_budget else sum(int(length) for length in batches[0].spans)
    totals = StepTotals(phi=phi, selected_tokens=phi, num_responses=len(batches[0].spans) * len(batches) * parallel.dp,
                        max_response_tokens=config.rollout.max_response_tokens)
    with recorder.phase("update", "activations"):
        step.backward(batches, TokenObjective(algo, totals), balance_coef=algo.balance_coef,
                      z_loss_coef=algo.z_loss_coef, counts=counts)
    with recorder.phase("metrics", "activations"):
        step.measure()
    with recorder.phase("optimiser step", "temporaries"):
        step.apply()
    return policy


PHASES = ("old log-probabilities", "reference log-probabilities", "update", "metrics", "optimiser step")
"""What a step runs, in order, after the building."""


@torch.no_grad()
def _initialise(policy: Policy) -> None:
    generator = torch.Generator(next(policy.gpt_models[0].parameters()).device).manual_seed(0)
    for _, parameter in _named_parameters(policy):
        parameter.normal_(0, 0.02, generator=generator)


def packed(workload: Workload, config: Config, cp_rank: int) -> list[PackedMicrobatch]:
    parallel = config.parallel
    samples = [_sample(index, length) for index, length in enumerate(workload.lengths)]
    return [pack(samples, multiple_of=parallel.token_multiple, cp_size=parallel.cp, cp_rank=cp_rank,
                 top_k=config.algo.distillation.top_k)
            for _ in range(workload.microbatches)]


def _sample(index: int, length: int) -> TrainSample:
    mask = np.arange(length + 1) > length // 12  # a prompt, then the response
    return TrainSample(index, np.zeros(length + 1, np.int32), mask, np.zeros(length + 1, np.float32), 0.5,
                       int(mask.sum()), sentences=np.arange(length + 1, dtype=np.int32) // TOKENS_PER_SENTENCE)


def _make_fake(batch: PackedMicrobatch, fake: FakeTensorMode) -> None:
    for field in dataclasses.fields(batch):
        value = vars(batch)[field.name]
        if isinstance(value, torch.Tensor):
            setattr(batch, field.name, fake.from_tensor(value))
