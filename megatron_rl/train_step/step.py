"""One optimiser step through Megatron's own schedule, and the no-gradient passes before it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import batched

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

from c3po import Max, SumCount
from megatron_rl.model.adapters import count_trained
from megatron_rl.model.attention import packed_sequences
from megatron_rl.model.build import Policy
from megatron_rl.model.router import RoutingCounts
from megatron_rl.model.routing_replay import MicrobatchRouting
from megatron_rl.model.slots import count_parameters
from megatron_rl.topology import Topology
from megatron_rl.train_step.logprobs import HeadOptions, head_outputs
from megatron_rl.train_step.loss_scaling import LossScaling
from megatron_rl.train_step.mtp import MtpStep
from megatron_rl.train_step.optimizer import apply_gradients, gradient_norm
from megatron_rl.train_step.report import ROUTER_SUMS, RankReport, merge_reports, read_together, stacked
from megatron_rl.types import PackedMicrobatch, StepResult

TokenLoss = Callable[..., tuple[torch.Tensor, dict[str, SumCount | Max]]]
"""(micro-batch, logprobs [T], entropy [T]) -> (its share of the step's loss, detached sums and maxima). A micro-batch
with teacher_ids [T, k] gives a fourth argument: the log-probabilities of these tokens, [T, k]."""
Routing = Sequence[MicrobatchRouting | None]


class TrainStep:
    """Runs packed micro-batches through a policy. Every rank calls every method with equally many micro-batches.

    If micro-batches have routed_experts, every pass of our own policy takes these experts. A reference policy always
    chooses by itself.
    """

    def __init__(self, policy: Policy, optimizer, topology: Topology, *, temperature: float, chunk_tokens: int,
                 mtp_optimizer=None):
        self.policy, self.optimizer, self.topology = policy, optimizer, topology
        self._mtp = None if mtp_optimizer is None else MtpStep(policy, mtp_optimizer, topology)
        self._head = HeadOptions(temperature=temperature, norm_head=policy.config.norm_head, chunk_tokens=chunk_tokens,
                                 tp_group=topology.tp_group, sequence_parallel=policy.transformer.sequence_parallel,
                                 fp32=policy.fp32_lm_head, impl=policy.backend.kernels.logprob)
        self._trained = {} if policy.adapters is None else {
            "train/trained_share": count_trained(policy.config, policy.lora) / count_parameters(policy.config)[0]}
        self._schedule = get_forward_backward_func()
        config = policy.transformer
        config.finalize_model_grads_func = self._finalize
        config.grad_scale_func = optimizer.scale_loss if optimizer is not None else None
        if optimizer is not None and policy.chunks[0].ddp_config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in policy.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    # ---- passes without gradient -------------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, microbatches: Sequence[PackedMicrobatch], policy: Policy | None = None) -> list[torch.Tensor]:
        """fp32 [T] per micro-batch on the last pipeline stage, an empty list elsewhere. `policy` None: our own."""
        routing = self._replayed(microbatches) if policy is None else [None] * len(microbatches)
        return self._logprobs(policy or self.policy, microbatches, routing)

    @torch.no_grad()
    def chosen_logprobs(self, microbatches: Sequence[PackedMicrobatch], policy: Policy | None = None, *,
                        top_k: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(ids int64 [T, k], their log-probabilities fp32 [T, k]) per micro-batch on the last stage, [] elsewhere.

        policy: as in logprobs(). top_k: of its k most probable tokens. 0: of the teacher_ids of each micro-batch.
        """
        routing = self._replayed(microbatches) if policy is None else [None] * len(microbatches)

        def read(batch: PackedMicrobatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if not top_k:
                return batch.teacher_ids, output[1:].T.contiguous()
            logprobs_kT, ids_kT = output[1:].chunk(2)
            return ids_kT.T.to(torch.int64, copy=True).contiguous(), logprobs_kT.T.contiguous()

        outputs = self._run(policy or self.policy, microbatches, routing, read, forward_only=True, top_k=top_k,
                            of_ids=not top_k)
        return outputs if self.topology.is_last_stage else []

    def _logprobs(self, policy: Policy, microbatches, routing: Routing) -> list[torch.Tensor]:
        outputs = self._run(policy, microbatches, routing, lambda batch, output: output[0].clone(), forward_only=True)
        return outputs if self.topology.is_last_stage else []

    @torch.no_grad()
    def count_routing(
        self, microbatches: Sequence[PackedMicrobatch], *, record: bool = False
    ) -> tuple[list[torch.Tensor], RoutingCounts]:
        """logprobs(), and from the same pass how this stage's layers routed the whole step.

        record: store the experts that were taken in routed_experts of each micro-batch, for the passes that follow.
        Returns (logprobs, counts summed over all ranks).
        """
        routing = self._recording(microbatches) if record else self._replayed(microbatches)
        with self._counting(with_gradient=False):
            logprobs = self._logprobs(self.policy, microbatches, routing)
        return logprobs, self.policy.router_losses.counts

    @contextlib.contextmanager
    def _counting(self, *, with_gradient: bool) -> Iterator[None]:
        """router_losses.counts of the forward passes inside, summed over the ranks at the end."""
        losses = self.policy.router_losses
        losses.begin_counting(with_gradient=with_gradient)
        yield
        losses.counting = None
        for store in (losses.counts.experts, losses.counts.entropies):
            for layer in sorted(store):
                torch.distributed.all_reduce(store[layer], group=self.topology.tp_dp_cp_group)

    # ---- the step ----------------------------------------------------------------------------------------

    def update(self, microbatches: Sequence[PackedMicrobatch], loss: TokenLoss, *, lr: float, balance_coef: float,
               z_loss_coef: float, counts: RoutingCounts | None) -> StepResult:
        """Forward, backward and optimiser step. The loss of the step is the sum of `loss` over all micro-batches.

        counts: from the pass before. None: this pass counts. The balance loss needs the step's load before the first
        gradient, so None with balance_coef only works if each rank has one micro-batch.
        If the loss or a gradient is not finite, no rank touches a weight or a moment, and the result is `skipped`.
        """
        self.backward(microbatches, loss, balance_coef=balance_coef, z_loss_coef=z_loss_coef, counts=counts)
        result = self.measure()
        if not result.skipped:
            for optimizer in (self.optimizer, *([] if self._mtp is None else [self._mtp.optimizer])):
                for group in optimizer.param_groups:
                    group["lr"] = lr
            self.apply()
        return dataclasses.replace(result, gauges={**result.gauges, **self._trained, "train/lr": lr})

    def measure(self) -> StepResult:
        """The result of the last backward(), equal on every rank; `skipped` if its loss or gradient is not finite.

        Megatron itself would clip by a norm of NaN and write NaN into every weight: the bf16 and fp32 optimisers have
        no check of their own (MixedPrecisionOptimizer.prepare_grads), and DDP's (check_for_nan_in_grad) raises on one
        rank and leaves the others waiting.
        """
        self._norm = gradient_norm(self.optimizer, self.topology)
        sums, gauges = self._metrics()
        if self._mtp is not None:
            gauges |= self._mtp.measure()
        finite = math.isfinite(self._norm) and math.isfinite(gauges["train/loss"])
        return StepResult(sums, {**gauges, "train/grad_norm": self._norm, "train/skipped_steps": float(not finite)},
                          skipped=not finite)

    def apply(self) -> None:
        """The optimiser step, with the gradients and the norm that measure() has seen, and the experts' biases."""
        apply_gradients(self.optimizer, self.policy.chunks, self._norm)
        if self._mtp is not None:
            self._mtp.apply()
        if self.policy.expert_bias_rate:
            for router in self.policy.routers:
                router.move_expert_bias(self._counts.experts[router.layer_number], self.policy.expert_bias_rate)

    def backward(self, microbatches: Sequence[PackedMicrobatch], loss: TokenLoss, *, balance_coef: float,
                 z_loss_coef: float, counts: RoutingCounts | None) -> None:
        """Accumulate and reduce the step's gradients into main_grad, without touching a weight."""
        here, losses = self.topology, self.policy.router_losses
        is_whole_step = len(microbatches) == 1 or counts is not None
        assert is_whole_step or not balance_coef or not self.policy.config.num_moe_layers, \
            "the balance loss of several micro-batches needs the whole step's load"
        scaling = LossScaling(len(microbatches), here.dp_size * here.cp_size, here.cp_size)
        losses.balance_coef, losses.z_coef = balance_coef, z_loss_coef
        losses.begin_update(step_tokens=self._step_tokens(microbatches), scale=scaling.router_scale,
                            load_fractions={} if counts is None else {
                                layer: c / c.sum().clamp(min=1) for layer, c in counts.experts.items()})
        for chunk in self._trained_chunks:
            chunk.restore_grad_buffers(synchronize=False)
        for chunk in self.policy.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.policy.train()
        if self._mtp is not None:
            self._mtp.begin(microbatches)

        def scaled(batch: PackedMicrobatch, output: torch.Tensor):
            chosen = [] if batch.teacher_ids is None else [output[2:2 + batch.teacher_ids.shape[1]].T]
            value, sums = loss(batch, output[0], output[1], *chosen)
            sums = {"loss": SumCount(value.detach(), torch.ones(())), **sums}
            if self._mtp is not None:
                mtp_loss, mtp_sums = self._mtp.loss(batch, output[-1])
                value, sums = value + mtp_loss, sums | mtp_sums
            return scaling.megatron_outputs(value, sums)

        self._sums, self._maxima = {}, {}
        routing = self._replayed(microbatches)
        with self._counting(with_gradient=True) if counts is None else contextlib.nullcontext():
            reports = self._run(self.policy, microbatches, routing, scaled, forward_only=False, of_ids=True)
        self._counts = losses.counts if counts is None else counts
        for record in filter(None, routing):
            losses.add(losses.loss_sums, "replay_differing", record.differing)
            losses.add(losses.loss_sums, "replay_choices", record.choices)
        for report in reports:
            for key, value in report.items():
                store = self._maxima if isinstance(value, Max) else self._sums
                if key not in store:
                    store[key] = value
                else:
                    store[key] = store[key].merge(value) if isinstance(value, Max) else store[key] + value

    def release_gradients(self) -> None:
        """Frees the buffers of gradients until the next backward(). What they hold is lost."""
        for chunk in self._trained_chunks:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)

    @property
    def _trained_chunks(self) -> list[torch.nn.Module]:
        """All that have gradients: the policy's, and the layer behind the last."""
        return [*self.policy.chunks, *([] if self._mtp is None else [self.policy.mtp_chunk])]

    def _step_tokens(self, microbatches: Sequence[PackedMicrobatch]) -> float:
        """Real tokens of the whole step, over all data-parallel ranks (prompt and response, padding excluded)."""
        tokens = torch.stack([batch.real.sum(dtype=torch.float64) for batch in microbatches]).sum()
        self.topology.sum_over_data(tokens)
        return max(1.0, float(tokens))

    # ---- running Megatron's schedule ---------------------------------------------------------------------

    def _run(self, policy: Policy, microbatches, routing: Routing, on_output, *, forward_only: bool, top_k: int = 0,
             of_ids: bool = False) -> list:
        """of_ids: the head also gives the log-probabilities of each micro-batch's teacher_ids, if it has them."""
        chunks = policy.chunks
        head = dataclasses.replace(self._head, with_entropy=not forward_only, top_k=top_k)
        iterators = [zip(microbatches, routing, strict=True) for _ in chunks]
        outputs = self._schedule(
            forward_step_func=partial(self._forward, policy, on_output, forward_only, head, of_ids),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(microbatches), seq_length=max(b.num_tokens for b in microbatches),
            micro_batch_size=1, decoder_seq_length=None, forward_only=forward_only,
            collect_non_loss_data=forward_only)
        for record in filter(None, routing):
            record.check_used(policy.moe_layers, times=2 if policy.routes_twice and not forward_only else 1)
        return outputs

    def _replayed(self, microbatches: Sequence[PackedMicrobatch]) -> Routing:
        return [None if batch.routed_experts is None else
                MicrobatchRouting(batch.routed_experts, batch.real, self._rows(batch)) for batch in microbatches]

    def _recording(self, microbatches: Sequence[PackedMicrobatch]) -> Routing:
        network = self.policy.config
        dtype = torch.uint8 if network.num_experts <= 256 else torch.int16
        for batch in microbatches:
            batch.routed_experts = torch.zeros(batch.num_tokens, network.num_moe_layers, network.num_experts_per_tok,
                                               dtype=dtype, device=self.topology.device)
        return [MicrobatchRouting(batch.routed_experts, batch.real, self._rows(batch), recording=True)
                for batch in microbatches]

    def _rows(self, batch: PackedMicrobatch) -> slice:
        """The positions of `batch` whose experts this rank chooses: its slice under sequence parallelism."""
        here = self.topology
        count = batch.num_tokens // (here.tp_size if self.policy.transformer.sequence_parallel else 1)
        first = here.tp_rank * count if self.policy.transformer.sequence_parallel else 0
        return slice(first, first + count)

    def _forward(self, policy: Policy, on_output, forward_only: bool, head: HeadOptions, of_ids: bool, iterator, chunk):
        batch, routing = next(iterator)
        padding = own_padding = ~batch.real[None]
        if policy.transformer.sequence_parallel:
            own_padding = scatter_to_sequence_parallel_region(padding.t().contiguous()).t().contiguous()
        packed = packed_sequences(batch, policy.config, routing, cp_size=self.topology.cp_size,
                                  cp_rank=self.topology.cp_rank)
        if of_ids:
            head = dataclasses.replace(head, ids_Tk=batch.teacher_ids)
        if self._mtp is not None and not forward_only:
            head = dataclasses.replace(head, mtp=self._mtp.forward(batch, packed, own_padding, head))
        output = chunk(
            batch.input_ids[None], batch.position_ids[None], None, labels=batch.labels[None], packed_seq_params=packed,
            # GPTModel._preprocess scatters the mask itself, on the first stage
            padding_mask=padding if self._is_first(policy, chunk) else own_padding,
            output_processor=head_outputs, output_processor_context=head)
        if forward_only:
            return output, lambda value, non_loss_data=True: on_output(batch, value)
        return output, lambda value: on_output(batch, value)

    def _finalize(self, chunks, *args, **kwargs) -> None:
        finalize_model_grads(chunks, *args, **kwargs)
        if self._mtp is not None:
            self._mtp.finalize(*args, **kwargs)

    def _is_first(self, policy: Policy, chunk) -> bool:
        return policy.gpt_models[policy.chunks.index(chunk)].pre_process

    # ---- metrics -----------------------------------------------------------------------------------------

    def _metrics(self) -> tuple[dict[str, SumCount], dict[str, float]]:
        """The step's sums and gauges over all ranks and pipeline stages; equal on every rank."""
        here, losses, counts = self.topology, self.policy.router_losses, self._counts
        keys, layers = sorted(self._sums), sorted(counts.experts)
        sums = stacked([part for key in keys for part in (self._sums[key].sum, self._sums[key].count)] or [0.0],
                       here.device)
        here.sum_over_data(sums)
        router = stacked([losses.loss_sums.get(key, 0.0) for key in ROUTER_SUMS], here.device)
        torch.distributed.all_reduce(router, group=here.tp_dp_cp_group)
        loads = [counts.experts[layer].max() / counts.experts[layer].mean().clamp(min=1e-9) for layer in layers]
        entropies = [counts.entropies[layer] / counts.experts[layer].sum() for layer in layers]
        sums, router, maxima, loads, entropies = read_together(
            sums, router, [largest.value for largest in self._maxima.values()], loads, entropies)
        top_k = self.policy.config.num_experts_per_tok
        reports = here.gather_objects(RankReport(
            stage=here.pp_rank, router=router, maxima=dict(zip(self._maxima, maxima, strict=True)),
            sums=dict(zip(keys, batched(sums, 2), strict=True)) if here.is_last_stage and keys else {},
            loads=dict(zip(layers, loads, strict=True)),
            entropies={layer: entropy * top_k for layer, entropy in zip(layers, entropies, strict=True)}))
        measured = losses.balance_coef or losses.z_coef  # without a coefficient the router does not compute its losses
        return merge_reports(reports, self.policy.config.num_moe_layers if measured else 0)
