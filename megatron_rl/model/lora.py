"""Low-rank adapters in Megatron's layers: y = W x + scale * B A x, with W frozen.

`attach` puts an Adapter beside each linear that model.lora names, before data parallelism wraps the model: Megatron's
gradient buffers and optimisers then hold the adapters alone. A hook on the linear adds what the adapter gives; experts
that are one grouped product ask for its matrices instead (kernel_layers.py). Adapters that are off add nothing: this
is the frozen policy of the KL term.

Gradients of a matrix that every tensor-parallel rank holds whole are sums over these ranks: Megatron adds them under
sequence parallelism (`sequence_parallel`, finalize_model_grads of megatron-core 0.19.2), which parallel.tp > 1 implies
here. Within experts, whose ranks Megatron does not add over, the matrix's own backward pass does.
Letters: N rows, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import nn

from megatron_rl.config.lora import LoraConfig
from megatron_rl.model.adapters import SHARED
from megatron_rl.model.latent_attention import WholeLinear


class Adapters:
    """All of one policy's. by_weight: the frozen weight -> its Adapter. on: whether they add anything."""

    def __init__(self):
        self.by_weight: dict[nn.Parameter, Adapter] = {}
        self.on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the policy is the network of model.path."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    @torch.no_grad()
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """W + scale * B A of this rank's piece, summed in float32, in W's dtype.

        W itself if it has no adapter or they are off.
        A cut of W is the same cut of B A, so no rank needs another's.
        """
        adapter = self.by_weight.get(weight)
        if adapter is None or not self.on:
            return weight.detach()
        low_rank = adapter.B.float() @ adapter.A.float()
        return (weight.float() + adapter.scale * low_rank).to(weight.dtype)


class Adapter(nn.Module):
    """A [r, in] and B [out, r] of one linear on this rank. shared: a matrix that another module owns, by its letter.

    group: the ranks that share the linear; None for one that is whole on each, whose adapter needs no other rank's.
    """

    def __init__(self, adapters: Adapters, linear: ColumnParallelLinear | RowParallelLinear | WholeLinear,
                 lora: LoraConfig, shared: dict[str, nn.Parameter]):
        super().__init__()
        self.adapters, rank = adapters, lora.rank
        self.column, self.scale = isinstance(linear, ColumnParallelLinear), lora.scale
        whole = isinstance(linear, WholeLinear)
        self.is_expert, self.group = linear.is_expert, None if whole else linear.tp_group
        out, inputs = linear.weight.shape
        cut = "" if whole else "B" if self.column else "A"
        for letter, shape in (("A", (rank, inputs)), ("B", (out, rank))):
            if letter in shared:
                object.__setattr__(self, letter, shared[letter])  # not a parameter of this module
            else:
                setattr(self, letter, _matrix(linear, shape, letter == cut))

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B for a product, whose gradients will be whole on every rank."""
        if not self.is_expert or self.group.size() == 1:
            return self.A, self.B
        whole = "A" if self.column else "B"
        return tuple(copy_to_tensor_model_parallel_region(getattr(self, letter), group=self.group)
                     if letter == whole and letter in self._parameters else getattr(self, letter) for letter in "AB")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the linear's output; x as the linear gets it. Ranks exchange [N, r]."""
        a, b = self.matrices()
        low = F.linear(x, a)
        if self.group is not None and not self.is_expert and self.group.size() > 1:
            low = gather_from_sequence_parallel_region(low, group=self.group) if self.column else \
                reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        return F.linear(self.scale * low, b)


def _matrix(linear, shape: tuple[int, int], cut: bool) -> nn.Parameter:
    """A parameter that Megatron reduces, clips and counts as the ranks hold it."""
    weight = linear.weight
    found = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
    # one that is whole on all ranks of a group counts once in the norm
    set_tensor_model_parallel_attributes(found, cut, 0 if isinstance(linear, ColumnParallelLinear) else 1, 1)
    found.allreduce = weight.allreduce
    if not cut and not linear.is_expert:
        found.sequence_parallel = linear.sequence_parallel
    return found


def attach(gpt_models: Sequence[GPTModel], lora: LoraConfig) -> Adapters:
    """Freeze the models and put adapters, all zero, beside the linears that `lora` names."""
    adapters = Adapters()
    for gpt in gpt_models:
        gpt.requires_grad_(False)
        for name, linear in list(gpt.named_modules()):
            if _gets_one(name, linear, lora) and not linear.is_expert:
                _attach(adapters, linear, lora, {})
        for experts in [module for module in gpt.modules() if isinstance(module, SequentialMLP)]:
            if lora.experts != "none":
                _attach_experts(adapters, experts, lora)
        if gpt.pre_process and gpt.config.recompute_granularity is not None:
            # recomputation gives outputs a gradient only if an input has one
            gpt.embedding.register_forward_hook(
                lambda _module, _inputs, output: output.requires_grad_() if torch.is_grad_enabled() else output)
    return adapters


def _gets_one(name: str, module: nn.Module, lora: LoraConfig) -> bool:
    kinds = ColumnParallelLinear | RowParallelLinear | WholeLinear
    return isinstance(module, kinds) and name.rpartition(".")[2] in lora.targets


def _attach_experts(adapters: Adapters, experts: SequentialMLP, lora: LoraConfig) -> None:
    targets, shared = [name for name in SHARED if name in lora.targets], {}
    if lora.experts == "shared_outer":
        first = experts.local_experts[0]
        shared = {target: {SHARED[target]: _shared(getattr(first, target), lora)} for target in targets}
        experts.lora = nn.ParameterDict({f"{target}_{letter}": matrix for target, matrices in shared.items()
                                         for letter, matrix in matrices.items()})
    for expert in experts.local_experts:
        for target in targets:
            _attach(adapters, getattr(expert, target), lora, shared.get(target, {}))


def _shared(linear, lora: LoraConfig) -> nn.Parameter:
    """The matrix of a layer's experts at the hidden size. All ranks of the stage hold it whole, and each has the
    gradient of what its own experts did for it: their sum is over tensor and data parallelism, as of a norm."""
    out, inputs = linear.weight.shape
    shape = (lora.rank, inputs) if isinstance(linear, ColumnParallelLinear) else (out, lora.rank)
    found = nn.Parameter(torch.zeros(shape, dtype=linear.weight.dtype, device=linear.weight.device))
    set_tensor_model_parallel_attributes(found, False, 0, 1)
    found.allreduce, found.sequence_parallel = True, linear.config.sequence_parallel
    return found


def _attach(adapters: Adapters, linear, lora: LoraConfig, shared: dict[str, nn.Parameter]) -> None:
    linear.lora = adapters.by_weight[linear.weight] = Adapter(adapters, linear, lora, shared)

    def add(module, inputs, output):
        if not adapters.on:
            return output
        added = module.lora(inputs[0])
        return output + added if torch.is_tensor(output) else (output[0] + added, *output[1:])

    linear.register_forward_hook(add)
