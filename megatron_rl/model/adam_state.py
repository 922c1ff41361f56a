"""What a rank holds of each parameter's training state, whichever of Megatron's optimisers it runs.

A parameter's state is three fp32 tensors of its size: the master weight and Adam's two moments. The distributed
optimiser keeps a flat range of them on each data-parallel rank, the others keep them whole.
Written for megatron-core 0.19.2: optimizer/distrib_optimizer.py (model_param_group_index_map,
_get_model_param_range_map) and optimizer/optimizer.py (Float16OptimizerWithFloat16Params sets param.main_param).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass
class AdamShard:
    """Elements [start, end) of one flattened parameter: `main` is the optimiser's own fp32 tensor of them.

    replicated: every data-parallel rank holds the same. With optimizer.offload (host_states.py) `main` has
    values during the optimiser's step only; tensors() are then those on the host.
    """

    parameter: torch.nn.Parameter
    start: int
    end: int
    main: torch.Tensor
    owner: torch.optim.Optimizer
    replicated: bool

    @property
    def has_own_weight(self) -> bool:
        """Whether `main` is a copy. A network in float32 is trained in place."""
        return self.parameter.dtype != torch.float32

    def tensors(self) -> dict[str, torch.Tensor]:
        """KINDS -> flat fp32 [end - start], to be read or written in place. Moments not yet made become zeros."""
        state = self.owner.state[self.main]
        if "exp_avg" not in state:
            state |= {"exp_avg": torch.zeros_like(self.main), "exp_avg_sq": torch.zeros_like(self.main)}
            if counts_per_parameter(self.owner):
                state["step"] = torch.tensor(0.0)
        weight = state.get("host_weight", self.main)
        return {"weight": weight.detach().view(-1), **{kind: state[kind].view(-1) for kind in KINDS[1:]}}


def adam_shards(optimizer, parameters: list[torch.nn.Parameter]) -> dict[torch.nn.Parameter, AdamShard]:
    """The shard of every parameter of which this rank holds a part; `optimizer` is what get_megatron_optimizer made."""
    shards: dict[torch.nn.Parameter, AdamShard] = {}
    owner_of_main: dict[torch.Tensor, torch.optim.Optimizer] = {}
    for each in _megatron_optimizers(optimizer):
        if isinstance(each, DistributedOptimizer):
            for parameter, (group, order) in each.model_param_group_index_map.items():
                held = each._get_model_param_range_map(parameter)["param"]
                main = each.optimizer.param_groups[group]["params"][order]
                shards[parameter] = AdamShard(parameter, held.start, held.end, main, each.optimizer, False)
        else:
            owner_of_main |= {main: each.optimizer for group in each.optimizer.param_groups for main in group["params"]}
    for parameter in parameters:
        main = parameter.main_param if hasattr(parameter, "main_param") else parameter
        if parameter not in shards and main is not None and main in owner_of_main:
            shards[parameter] = AdamShard(parameter, 0, parameter.numel(), main, owner_of_main[main], True)
    return shards


def step_count(optimizer) -> int:
    """Optimiser steps that were taken, from Adam's own counters; 0 on a rank that holds no state."""
    counts = set()
    for each in _megatron_optimizers(optimizer):
        inner = each.optimizer
        if counts_per_parameter(inner):
            counts |= {int(state["step"]) for state in inner.state.values() if "step" in state}
        else:
            counts |= {int(group["step"]) for group in inner.param_groups if group["params"] and "step" in group}
    assert len(counts) <= 1, f"Adam's step counters differ: {counts}"
    return counts.pop() if counts else 0


def set_step_count(optimizer, count: int) -> None:
    """Every counter of this rank, each parameter's its own tensor. After AdamShard.tensors has made the state."""
    for each in _megatron_optimizers(optimizer):
        if counts_per_parameter(each.optimizer):
            for state in each.optimizer.state.values():
                state["step"] = torch.tensor(float(count))
        else:
            for group in each.optimizer.param_groups:
                group["step"] = count


def counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """torch's Adam counts steps per parameter, Transformer Engine's and Apex's per parameter group."""
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def _megatron_optimizers(optimizer) -> Iterator:
    """Those that hold parameters: a rank without expert parameters, say, has an empty one."""
    chained = optimizer.chained_optimizers if hasattr(optimizer, "chained_optimizers") else [optimizer]
    return (each for each in chained if each.optimizer is not None)
