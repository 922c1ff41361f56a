"""The shared expert computes while rows travel to the ranks of their experts.

Megatron's moe_shared_expert_overlap (megatron-core 0.19.2, transformer/moe/shared_experts.py) moves the shared expert
to a CUDA stream of its own and its halves into the dispatcher. Here the exchange is started ahead instead: NCCL has a
stream of its own already. The shared expert follows on the stream of everything else, and then the exchange is waited
for. So the parameters, the numbers and the CPU's path are those without overlap.

The backward pass overlaps in the same way without being told. Autograd runs the newest node first, and the shared
expert's nodes lie between those of the start and of the wait.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_rl.model.kernel_layers import DeviceCounts
from megatron_rl.model.routing_replay import RoutedMoELayer


class Exchange:
    """One all-to-all of rows [N, ...] in two parts, each with its gradient: `start`, then `wait` on what it gave.

    sent, received: rows for and from each rank of the group. What `start` gave is nothing but to be waited for.
    """

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int]):
        self.group, self.sent, self.received = group, sent, received
        self.work: dist.Work | None = None
        self.gradient: torch.Tensor | None = None

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        return _Start.apply(rows, self)

    def wait(self, rows: torch.Tensor) -> torch.Tensor:
        return _Wait.apply(rows, self)

    def begin(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        rows = rows.contiguous()
        out = rows.new_empty([sum(received), *rows.shape[1:]])
        self.work = dist.all_to_all_single(out, rows, received, sent, group=self.group, async_op=True)
        return out

    def end(self) -> None:
        self.work.wait()
        self.work = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, exchange):
        ctx.exchange = exchange
        return exchange.begin(rows, exchange.sent, exchange.received)

    @staticmethod
    def backward(ctx, _):
        """The gradient that _Wait.backward has begun to send; what autograd hands over is only its place."""
        exchange = ctx.exchange
        exchange.end()
        gradient, exchange.gradient = exchange.gradient, None
        return gradient, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, exchange):
        ctx.exchange = exchange
        exchange.end()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, gradient):
        exchange = ctx.exchange
        exchange.gradient = exchange.begin(gradient, exchange.received, exchange.sent)
        return gradient, None


class StartedAhead(MoEAlltoAllTokenDispatcher):
    """Runs `meanwhile` between the start and the end of the dispatch; `output` is what it gave."""

    meanwhile = output = None

    def token_dispatch(self, permutated_local_input_tokens, permuted_probs):
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        meanwhile, self.meanwhile = self.meanwhile, None
        if self.ep_size == 1:
            self.output = meanwhile()
            return permutated_local_input_tokens, permuted_probs
        splits = self.input_splits.tolist(), self.output_splits.tolist()
        rows, weights = (Exchange(self.ep_group, *splits) for _ in range(2))
        started = rows.start(permutated_local_input_tokens), weights.start(permuted_probs)
        self.output = meanwhile()
        return rows.wait(started[0]), weights.wait(started[1])


class StartedAheadWithDeviceCounts(StartedAhead, DeviceCounts):
    """DeviceCounts, started ahead."""


class OverlappedMoELayer(RoutedMoELayer):
    """A RoutedMoELayer whose shared expert computes during the dispatch. dispatcher: StartedAhead, or a subclass."""

    def __init__(self, config, *args, pg_collection=None, dispatcher: type[StartedAhead], **kwargs):
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher = dispatcher(self.num_local_experts, self.local_expert_indices, config=self.config,
                                           pg_collection=pg_collection)

    def shared_experts_compute(self, hidden_states):
        self.token_dispatcher.meanwhile = partial(super().shared_experts_compute, hidden_states)

    def postprocess(self, output, shared_expert_output):
        shared, self.token_dispatcher.output = self.token_dispatcher.output, None
        return super().postprocess(output, shared)
