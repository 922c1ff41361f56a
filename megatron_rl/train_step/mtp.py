"""The step of the layer behind the last (model/mtp.py), beside the policy's own and apart from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from megatron.core.distributed import finalize_model_grads

from c3po import SumCount
from megatron_rl.model.attention import PackedSequences
from megatron_rl.model.build import Policy
from megatron_rl.topology import Topology
from megatron_rl.train_step.logprobs import HeadOptions, token_logprobs
from megatron_rl.train_step.optimizer import apply_gradients, gradient_norm
from megatron_rl.types import PackedMicrobatch


class MtpStep:
    """Its loss is the mean of -log p(token t+2) over the step's tokens t+2 that carry loss, of all ranks."""

    def __init__(self, policy: Policy, optimizer, topology: Topology):
        self._policy, self.optimizer, self._topology = policy, optimizer, topology
        self._chunk = policy.mtp_chunk
        self._targets, self._norm = 1.0, 0.0

    def begin(self, microbatches: Sequence[PackedMicrobatch]) -> None:
        """Zero gradients, and the number of tokens that the step's loss is over."""
        self._chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._chunk.train()
        targets = torch.stack([batch.second_mask.sum(dtype=torch.float64) for batch in microbatches]).sum()
        self._topology.sum_over_data(targets)
        self._targets = max(1.0, float(targets))

    def forward(self, batch: PackedMicrobatch, packed: PackedSequences, padding_mask: torch.Tensor,
                head: HeadOptions) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """HeadOptions.mtp of a micro-batch: log-probabilities of second_labels, fp32 [T], from detached states and
        head. padding_mask: of this rank's rows."""
        packed = copy.copy(packed)
        packed.routing = None  # which is about the trunk's layers
        (gpt,) = self._policy.gpt_models

        def logprobs(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                embedded = gpt.embedding(input_ids=batch.labels[None], position_ids=batch.position_ids[None])
            predicted = self._chunk(embedded, states.detach(), packed, padding_mask)
            options = replace(head, with_entropy=False)
            return token_logprobs(predicted, weight.detach(), batch.second_labels, options)[0]

        return logprobs

    def loss(self, batch: PackedMicrobatch, logprobs_T: torch.Tensor) -> tuple[torch.Tensor, dict[str, SumCount]]:
        """(a micro-batch's share of the step's loss, its detached sum)."""
        total = -torch.where(batch.second_mask, logprobs_T, 0.0).sum()
        return total / self._targets, {"mtp_loss": SumCount(total.detach(), batch.second_mask.sum())}

    def finalize(self, *args, **kwargs) -> None:
        """Sums the gradients over the ranks, as Megatron does those of the trunk."""
        finalize_model_grads([self._chunk], *args, **kwargs)

    def measure(self) -> dict[str, float]:
        """The gradients' norm. Gradients that are not finite count as zero: they must not hold up the trunk's step."""
        self._norm = gradient_norm(self.optimizer, self._topology)
        found = {"train/mtp_grad_norm": self._norm}
        if not math.isfinite(self._norm):
            self._chunk.zero_grad_buffer()
            self._norm = gradient_norm(self.optimizer, self._topology)
        return found

    def apply(self) -> None:
        apply_gradients(self.optimizer, [self._chunk], self._norm)
