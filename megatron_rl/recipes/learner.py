"""The policy under training: plan, pack, no-gradient passes, then one optimiser step per StepBatch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from c3po import StepTotals
from megatron_rl.batch import StepBatch, common_tokens, pack, plan_microbatches
from megatron_rl.config.schema import Config
from megatron_rl.model.architectures import read_config
from megatron_rl.model.build import Policy, build_policy
from megatron_rl.model.convert import Exporter, load_hf
from megatron_rl.model.network import Network
from megatron_rl.model.router import RoutingCounts
from megatron_rl.observe.dump import StepInputs
from megatron_rl.observe.flops import attention_balance_tokens
from megatron_rl.observe.timing import Timers
from megatron_rl.recipes.guarded import GuardedStep
from megatron_rl.recipes.objective import TokenObjective
from megatron_rl.recipes.routing import share_routed_experts
from megatron_rl.topology import Topology
from megatron_rl.train_step.optimizer import build_optimizer, learning_rate
from megatron_rl.train_step.step import TrainStep
from megatron_rl.types import PackedMicrobatch, StepResult, TrainSample


def build_trainable(config: Config, topology: Topology, *, temperature: float) -> tuple[Policy, object, TrainStep]:
    """The policy with the weights of model.path, its optimiser and its TrainStep."""
    network = read_config(config.model.path)
    policy = build_policy(network, config.model, config.parallel, with_gradients=True)
    load_hf(policy, topology, config.model.path)
    optimizer = build_optimizer(policy, config.optimizer, config.parallel)
    if policy.transformer.bf16:
        optimizer.reload_model_params()  # the fp32 master copies were made before the weights were loaded
    step = TrainStep(policy, optimizer, topology, temperature=temperature,
                     chunk_tokens=config.batch.logprob_chunk_tokens)
    return policy, optimizer, step


def packed_microbatches(samples: Sequence[TrainSample], config: Config, topology: Topology, network: Network, *,
                        experts_shape: tuple[int, int] | None = None) -> list[PackedMicrobatch]:
    """This rank's micro-batches of `samples`; every rank gets equally many. experts_shape as in pack(), of the experts
    that rank 0's samples have."""
    parallel, cp_size = config.parallel, topology.cp_size
    lengths = [len(sample.token_ids) - 1 for sample in samples]
    plan = plan_microbatches(
        lengths, dp_size=topology.dp_size, cp_size=cp_size,
        tokens_per_microbatch=config.batch.tokens_per_microbatch, align=parallel.token_multiple,
        multiple_of=parallel.pp if parallel.vpp else 1,
        attention_tokens=attention_balance_tokens(dataclasses.asdict(network)))
    if experts_shape is not None:
        places = [[i for members in microbatches for i in members] for microbatches in plan]
        samples = share_routed_experts(samples, places, topology, experts_shape)
    align = {"multiple_of": parallel.token_multiple, "cp_size": cp_size}
    least = common_tokens(plan, lengths, **align) if parallel.token_dispatcher == "allgather" else [0] * len(plan[0])
    return [pack([samples[i] for i in members], **align, cp_rank=topology.cp_rank, min_tokens=tokens,
                 device=topology.device, experts_shape=experts_shape)
            for members, tokens in zip(plan[topology.dp_rank], least, strict=True)]


class PolicyLearner:
    """loop.Learner on Megatron. updates_done: the place in the learning-rate schedule, which spans schedule_updates
    optimiser steps (None: those of the run). stage: index of the run's stage, None in a run without."""

    def __init__(self, config: Config, topology: Topology, schedule_updates: int | None = None,
                 stage: int | None = None):
        self.config, self.topology = config, topology
        self._schedule_updates = schedule_updates or config.run.steps * config.c3po.updates_per_rollout
        self.policy, self.optimizer, self.step = build_trainable(
            config, topology, temperature=config.rollout.temperature)
        self.exporter = Exporter(self.policy, topology)
        self._guarded = GuardedStep(config, topology, self.step, self.exporter, temperature=config.rollout.temperature,
                                    stage=stage)
        self._reference: Policy | None = None
        if config.c3po.loss.kl_coef > 0:
            self._reference = build_policy(self.policy.config, config.model, config.parallel, with_gradients=False)
            load_hf(self._reference, topology, config.model.reference_path or config.model.path)
        self.updates_done = 0

    def state_dict(self) -> dict[str, int]:
        return {"updates_done": self.updates_done, "skipped_in_a_row": self._guarded.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates_done, self._guarded.in_a_row = state["updates_done"], state["skipped_in_a_row"]

    def learn(self, batches: Sequence[StepBatch], timers: Timers) -> list[StepResult]:
        """Old (and reference) log-probabilities of all batches first, then their optimiser steps in order."""
        with timers("logprobs"):
            prepared = [self._prepare(batch) for batch in batches]
        with timers("train"):
            return [self._update(batch, *parts) for batch, parts in zip(batches, prepared, strict=True)]

    def _prepare(self, batch: StepBatch) -> tuple[list[PackedMicrobatch], RoutingCounts | None]:
        network, replay = self.policy.config, self.config.c3po.router_replay
        shape = (network.num_moe_layers, network.num_experts_per_tok) if replay == "rollout" else None
        microbatches = packed_microbatches(batch.samples, self.config, self.topology, network, experts_shape=shape)
        old, counts = None, None
        if self._needs_old_pass:
            old, counts = self.step.count_routing(microbatches, record=replay == "trainer")
        reference = None if self._reference is None else self.step.logprobs(microbatches, self._reference)
        if self.topology.is_last_stage:  # elsewhere no loss is computed
            for i, microbatch in enumerate(microbatches):
                microbatch.old_logprobs = None if old is None else old[i]
                microbatch.ref_logprobs = None if reference is None else reference[i]
        return microbatches, counts

    @property
    def _needs_old_pass(self) -> bool:
        """Whether the update's own forward pass cannot tell what the pass before it would: with one update to a
        rollout it starts from the old log-probabilities, so only the balance loss (the whole step's load, before any
        gradient) and routes recorded for replay need one."""
        algo, network = self.config.c3po, self.policy.config
        return (algo.updates_per_rollout > 1 or algo.router_replay == "trainer"
                or (network.num_moe_layers > 0 and algo.balance_coef > 0))

    def _update(self, batch: StepBatch, microbatches: list[PackedMicrobatch], counts) -> StepResult:
        algo = self.config.c3po
        totals = StepTotals(phi=batch.selection.phi, selected_tokens=batch.selection.selected_tokens,
                            num_responses=batch.num_responses,
                            max_response_tokens=self.config.rollout.max_response_tokens)
        lr = learning_rate(self.updates_done, self._schedule_updates, self.config.optimizer)
        self.updates_done += 1
        return self._guarded.update(self.updates_done, StepInputs(
            microbatches, TokenObjective(algo, totals), counts, algo.balance_coef, algo.z_loss_coef), lr=lr)
