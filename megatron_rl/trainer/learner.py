"""The policy under training: pack, no-gradient passes, then one optimiser step per UpdateShard."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import torch

from c3po import StepTotals
from megatron_rl.batch import pack
from megatron_rl.config.distillation import DistillationConfig
from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.schema import AlgoConfig, Config, ModelConfig
from megatron_rl.handoff import UpdateShard, schedule
from megatron_rl.model.adapter_folder import starting_adapters
from megatron_rl.model.adapters import needs_reference_copy
from megatron_rl.model.architectures import read_config
from megatron_rl.model.build import Policy, build_policy
from megatron_rl.model.convert import Exporter, fill_adapters, load_hf
from megatron_rl.model.network import Network
from megatron_rl.model.router import RoutingCounts
from megatron_rl.observe.dump import StepInputs
from megatron_rl.observe.timing import Timers
from megatron_rl.topology import Topology
from megatron_rl.train_step.optimizer import build_mtp_optimizer, build_optimizer, chained, learning_rate, settle
from megatron_rl.train_step.step import TrainStep
from megatron_rl.trainer.guarded import GuardedStep
from megatron_rl.trainer.objective import TokenObjective
from megatron_rl.types import PackedMicrobatch, StepResult, TrainSample


def build_trainable(config: Config, topology: Topology, *, temperature: float) -> tuple[Policy, object, TrainStep]:
    """The policy with the weights of model.path (and its adapters), all its optimisers as one, and its TrainStep."""
    network = read_config(config.model.path)
    policy = build_policy(network, config.model, config.parallel, with_gradients=True)
    load_hf(policy, topology, config.model.path)
    if policy.adapters is not None:
        fill_adapters(policy, topology, starting_adapters(config.model, network, config.run.seed))
    optimizer = build_optimizer(policy, config.optimizer, config.parallel)
    settle(optimizer, policy, offload=config.offloads_optimizer)
    mtp_optimizer = build_mtp_optimizer(policy, config.optimizer, config.parallel, offload=config.offloads_optimizer)
    step = TrainStep(policy, optimizer, topology, temperature=temperature,
                     chunk_tokens=config.batch.logprob_chunk_tokens, mtp_optimizer=mtp_optimizer)
    return policy, chained(optimizer, mtp_optimizer), step


def packed_microbatches(samples: Sequence[TrainSample], config: Config, topology: Topology,
                        network: Network) -> list[PackedMicrobatch]:
    """This rank's micro-batches of `samples`, which every rank has in full. Every rank gets equally many."""
    plan, least = schedule([len(sample.token_ids) - 1 for sample in samples], config, dataclasses.asdict(network))
    return pack_all([[samples[place] for place in members] for members in plan[topology.dp_rank]], least, config,
                    topology)


def pack_all(microbatches: Sequence[Sequence[TrainSample]], least_tokens: Sequence[int], config: Config,
             topology: Topology, experts_shape: tuple[int, int] | None = None, *,
             top_k: int = 0) -> list[PackedMicrobatch]:
    """Packs for this context-parallel rank. least_tokens: each micro-batch is padded to at least this many."""
    return [pack(members, multiple_of=config.parallel.token_multiple, cp_size=topology.cp_size,
                 cp_rank=topology.cp_rank, min_tokens=tokens, device=topology.device, experts_shape=experts_shape,
                 top_k=top_k)
            for members, tokens in zip(microbatches, least_tokens, strict=True)]


def frozen_options(options: ModelConfig) -> ModelConfig:
    """model.* of a policy that only looks: without adapters and without the layer behind the last."""
    return dataclasses.replace(options, lora=LoraConfig(), mtp=False)


def teachers_of(config: Config, topology: Topology) -> dict[int, TrainStep]:
    """By their places in algo.distillation.teachers: those that the ranks hold, as steps that only look."""
    found = {}
    for place, teacher in enumerate(config.algo.distillation.teachers.values()):
        if teacher.checkpoint is not None:
            options = dataclasses.replace(frozen_options(config.model), path=teacher.checkpoint)
            policy = build_policy(read_config(teacher.checkpoint), options, config.parallel, with_gradients=False)
            load_hf(policy, topology, teacher.checkpoint)
            found[place] = TrainStep(policy, None, topology, temperature=config.rollout.temperature,
                                     chunk_tokens=config.batch.logprob_chunk_tokens)
    return found


def fill_in_teacher(microbatch: PackedMicrobatch, place: int, logprobs: torch.Tensor,
                    ids_Tk: torch.Tensor | None = None) -> None:
    """Writes what the teacher at `place` says of its own samples into teacher_logprobs: [T], or [T, k] of ids_Tk.

    There NaN means that nobody has said anything, and the token would train without its teacher. A NaN of the teacher
    itself becomes -inf, so that the loss is not finite and the step is skipped and told.
    """
    logprobs = torch.where(logprobs.isnan(), -torch.inf, logprobs)
    own = microbatch.teachers == place
    if ids_Tk is not None:
        own = own[:, None]
        microbatch.teacher_ids = torch.where(own, ids_Tk, microbatch.teacher_ids)
    microbatch.teacher_logprobs = torch.where(own, logprobs, microbatch.teacher_logprobs)


def teach(microbatches: Sequence[PackedMicrobatch], config: DistillationConfig, student: TrainStep,
          teachers: Mapping[int, TrainStep]) -> None:
    """Every teacher's pass without gradient; its results are filled in on the last pipeline stage.

    With top_k_of=student a pass of the student comes first, for its k most probable tokens.
    """
    is_last_stage = student.topology.is_last_stage
    if config.top_k and config.top_k_of == "student":
        for microbatch, (ids_Tk, _) in zip(microbatches if is_last_stage else [],
                                           student.chosen_logprobs(microbatches, top_k=config.top_k), strict=True):
            microbatch.teacher_ids = ids_Tk
    for place, teacher in teachers.items():
        if config.top_k:
            found = teacher.chosen_logprobs(microbatches, teacher.policy,
                                            top_k=config.top_k if config.top_k_of == "teacher" else 0)
        else:
            found = [(None, logprobs_T) for logprobs_T in teacher.logprobs(microbatches, teacher.policy)]
        for microbatch, (ids_Tk, logprobs) in zip(microbatches if is_last_stage else [], found, strict=True):
            fill_in_teacher(microbatch, place, logprobs, ids_Tk)


def needs_old_pass(algo: AlgoConfig, network: Network) -> bool:
    """Whether an update needs a separate no-grad pass before it.

    With one update to a rollout the old log-probabilities equal the update's own, so it does not, unless the balance
    loss needs the whole step's load before any gradient, or routes are recorded for replay.
    """
    return (algo.updates_per_rollout > 1 or algo.router_replay == "trainer"
            or (network.num_moe_layers > 0 and algo.balance_coef > 0))


class PolicyLearner:
    """The policy on Megatron.

    - updates_done: the place in the learning-rate schedule.
    - schedule_updates: the optimiser steps that the schedule spans; None: those of the run.
    - stage: index of the run's stage; None in a run without stages.
    """

    def __init__(self, config: Config, topology: Topology, schedule_updates: int | None = None,
                 stage: int | None = None):
        self.config, self.topology = config, topology
        self._schedule_updates = schedule_updates or config.run.steps * config.algo.updates_per_rollout
        self.policy, self.optimizer, self.step = build_trainable(
            config, topology, temperature=config.rollout.temperature)
        self.exporter = Exporter(self.policy, topology)
        self._guarded = GuardedStep(config, topology, self.step, self.exporter, temperature=config.rollout.temperature,
                                    stage=stage)
        self._reference: Policy | None = None
        if config.algo.loss.kl_coef > 0 and needs_reference_copy(config.model):
            self._reference = build_policy(self.policy.config, frozen_options(config.model), config.parallel,
                                           with_gradients=False)
            load_hf(self._reference, topology, config.model.reference_path or config.model.path)
        self._teachers = teachers_of(config, topology)
        self.updates_done = 0

    def state_dict(self) -> dict[str, int]:
        return {"updates_done": self.updates_done, "skipped_in_a_row": self._guarded.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates_done, self._guarded.in_a_row = state["updates_done"], state["skipped_in_a_row"]

    def learn(self, updates: Sequence[UpdateShard], timers: Timers) -> list[StepResult]:
        """Old (and reference) log-probabilities of all updates first, then their optimiser steps in order."""
        with timers("logprobs"):
            prepared = [self._prepare(update) for update in updates]
        with timers("train"):
            return [self._update(update, *parts) for update, parts in zip(updates, prepared, strict=True)]

    def _prepare(self, update: UpdateShard) -> tuple[list[PackedMicrobatch], RoutingCounts | None]:
        network, replay = self.policy.config, self.config.algo.router_replay
        shape = (network.num_moe_layers, network.num_experts_per_tok) if replay == "rollout" else None
        microbatches = pack_all(update.microbatches(), update.least_tokens, self.config, self.topology, shape,
                                top_k=self.config.algo.distillation.top_k)
        old, counts = None, None
        if needs_old_pass(self.config.algo, network):
            old, counts = self.step.count_routing(microbatches, record=replay == "trainer")
        reference = self._reference_logprobs(microbatches) if self.config.algo.loss.kl_coef > 0 else None
        if self.topology.is_last_stage:  # elsewhere no loss is computed
            for i, microbatch in enumerate(microbatches):
                microbatch.old_logprobs = None if old is None else old[i]
                microbatch.ref_logprobs = None if reference is None else reference[i]
        teach(microbatches, self.config.algo.distillation, self.step, self._teachers)
        return microbatches, counts

    def _reference_logprobs(self, microbatches: list[PackedMicrobatch]) -> list[torch.Tensor]:
        """Those of the frozen policy: a copy of its own, or this one without its adapters."""
        with contextlib.nullcontext() if self._reference is not None else self.policy.adapters.off():
            return self.step.logprobs(microbatches, self._reference or self.policy)

    def _update(self, update: UpdateShard, microbatches: list[PackedMicrobatch], counts) -> StepResult:
        algo = self.config.algo
        totals = StepTotals(phi=update.phi, selected_tokens=update.selected_tokens,
                            num_responses=update.num_responses,
                            max_response_tokens=self.config.rollout.max_response_tokens)
        lr = learning_rate(self.updates_done, self._schedule_updates, self.config.optimizer)
        self.updates_done += 1
        return self._guarded.update(self.updates_done, StepInputs(
            microbatches, TokenObjective(algo, totals), counts, algo.balance_coef, algo.z_loss_coef), lr=lr)
