"""Finds where a step stops being finite: hooks on the network of one rank, for the replay of a step.

Findings are sorted in the order of computing: weights, inputs of the step, forward pass by micro-batch and layer,
loss, backward pass, gradients of the parameters.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_rl.model.build import Policy
from megatron_rl.model.convert import slots, trained_slots
from megatron_rl.topology import Topology
from megatron_rl.types import PackedMicrobatch

PHASES = ("weight", "input", "forward", "log-probability", "loss", "backward", "gradient")
INPUTS = ("advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")
LAYER_PARTS = ("self_attention", "mlp")


@dataclass(frozen=True, order=True)
class Finding:
    """The first value of one place that is not finite. Findings sort by PHASES, micro-batch and depth.

    - microbatch: of this rank, from 0; -1 outside any.
    - depth: 0 is the embedding, then three for each layer (attention, MLP, the whole). It is negative in the backward
      pass, which goes down.
    - sample: TrainSample.index, -1 if unknown.
    - what: in words.
    """

    phase: int
    microbatch: int
    depth: int
    what: str
    rank: int
    sample: int

    def text(self) -> str:
        where = f", micro-batch {self.microbatch} of rank {self.rank}" if self.microbatch >= 0 else ""
        return f"{PHASES[self.phase]}: {self.what}{where}{f', sample {self.sample}' if self.sample >= 0 else ''}"


class Watch:
    """Collects findings of one backward(). `with watch.hooked(): step.backward(..., watch.objective(loss), ...)`."""

    def __init__(self, policy: Policy, topology: Topology, microbatches: list[PackedMicrobatch]):
        self._policy, self._here, self._batches = policy, topology, microbatches
        self._forwards = dict.fromkeys(range(len(policy.gpt_models)), -1)
        self._running: int | None = None
        self.findings: list[Finding] = []
        for slot, parameter in {**dict(slots(policy, topology)), **dict(trained_slots(policy, topology))}.items():
            self._check("weight", slot.key, parameter)
        for index, batch in enumerate(microbatches):
            for name in INPUTS:
                values = getattr(batch, name)
                if values is not None:
                    self._check("input", name, torch.where(batch.loss_mask, values, 0.0), index, rows=True)

    def objective(self, loss):
        """`loss`, with a check of its inputs and its value. Micro-batches must come in order."""
        count = iter(range(len(self._batches)))

        def watched(batch, logprobs_T, *more):
            index = next(count)
            selected = torch.where(batch.loss_mask, logprobs_T.detach(), 0.0)
            self._check("log-probability", "of a selected token", selected, index, rows=True)
            value, sums = loss(batch, logprobs_T, *more)
            self._check("loss", "of the micro-batch", value, index)
            return value, sums

        return watched

    def look_at_gradients(self) -> None:
        """After backward(): this rank's main_grad of every parameter."""
        for slot, parameter in trained_slots(self._policy, self._here):
            self._check("gradient", slot.key, parameter.main_grad)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for chunk, gpt in enumerate(self._policy.gpt_models):
            handles += [gpt.register_forward_pre_hook(self._begin(chunk)), gpt.register_forward_hook(self._end)]
            places = [] if not gpt.pre_process else [(0, "embedding", gpt.embedding)]
            for layer in gpt.decoder.layers:
                number = layer.layer_number
                parts = [(f" {name}", getattr(layer, name)) for name in LAYER_PARTS] + [("", layer)]
                places += [(3 * number + index, f"layer {number}{name}", module)
                           for index, (name, module) in enumerate(parts)]
            handles += [module.register_forward_hook(self._looked_at(depth, what)) for depth, what, module in places]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, chunk: int):
        def hook(*_):
            self._forwards[chunk] += 1
            self._running = self._forwards[chunk]

        return hook

    def _end(self, *_) -> None:
        self._running = None

    def _looked_at(self, depth: int, what: str):
        recomputed = itertools.count()  # during the backward pass, micro-batches in their order

        def hook(_module, _inputs, outputs):
            output = outputs[0] if isinstance(outputs, tuple) else outputs
            index = next(recomputed) if self._running is None else self._running
            if self._running is not None:
                self._check("forward", f"output of {what}", output, index, depth, rows=True)
            if output.requires_grad:  # under recompute only the second time
                output.register_hook(lambda gradient: self._check(
                    "backward", f"gradient of the output of {what}", gradient, index, -depth, rows=True))

        return hook

    @torch.no_grad()
    def _check(self, phase: str, what: str, values: torch.Tensor, microbatch: int = -1, depth: int = 0, *,
               rows: bool = False) -> None:
        bad = ~torch.isfinite(values)
        if not bool(bad.any()):
            return
        sample = self._sample(microbatch, bad.flatten(1).any(1) if bad.dim() > 1 else bad) if rows else -1
        self.findings.append(Finding(PHASES.index(phase), microbatch, depth, what, self._here.rank, sample))

    def _sample(self, microbatch: int, bad_rows: torch.Tensor) -> int:
        """TrainSample.index of the first bad row; rows are this rank's share of T under sequence parallelism."""
        batch, here = self._batches[microbatch], self._here
        row = int(bad_rows.nonzero()[0])
        if bad_rows.numel() < batch.num_tokens:
            row += here.tp_rank * bad_rows.numel()
        place = int(batch.source[row])
        ends = torch.tensor(batch.sample_lengths).cumsum(0)
        return -1 if place < 0 else batch.sample_indices[int(torch.searchsorted(ends, place, right=True))]
