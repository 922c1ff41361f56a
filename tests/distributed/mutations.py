"""Faults that are put into the step on purpose, one factor each: every one must show in the gradients (cases.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

import tests.distributed.cases as cases
from megatron_rl.model import attention
from megatron_rl.model.router import BudgetRouter, RouterLosses
from megatron_rl.topology import Topology
from megatron_rl.train_step import logprobs
from megatron_rl.train_step.loss_scaling import LossScaling

BREAK: dict[str, Callable] = {}
"""Name -> function of the worker's Runner that returns the context in which the factor is broken."""


def breaks(function: Callable) -> Callable:
    BREAK[function.__name__] = function
    return function


def _scaling(**changes: Callable[[LossScaling], int]):
    """LossScaling.megatron_outputs computed from other sizes."""
    original = LossScaling.megatron_outputs

    def broken(self, loss, metrics):
        return original(dataclasses.replace(self, **{key: f(self) for key, f in changes.items()}), loss, metrics)

    return patch.object(LossScaling, "megatron_outputs", broken)


# ---- Megatron's factors (train_step/loss_scaling.py) ------------------------------------------------------

@breaks
def loss_without_microbatches(runner):
    return _scaling(num_microbatches=lambda s: 1)


@breaks
def loss_without_dp(runner):
    return _scaling(dp_cp_size=lambda s: s.cp_size)


@breaks
def loss_without_cp(runner):
    return _scaling(dp_cp_size=lambda s: s.dp_cp_size // s.cp_size)


@breaks
def router_scale_without_microbatches(runner):
    return patch.object(LossScaling, "router_scale", property(lambda s: s.dp_cp_size / s.cp_size))


@breaks
def router_scale_without_dp(runner):
    return patch.object(LossScaling, "router_scale", property(lambda s: s.num_microbatches))


@breaks
def router_scale_with_cp_twice(runner):
    return patch.object(LossScaling, "router_scale", property(lambda s: s.num_microbatches * s.dp_cp_size))


# ---- terms of the loss ------------------------------------------------------------------------------------

def _more(name: str, factor: float = 1.1):
    """LOSS with one number a tenth larger."""
    return patch.object(cases, "LOSS", dataclasses.replace(cases.LOSS, **{name: factor * getattr(cases.LOSS, name)}))


@breaks
def more_kl(runner):
    return _more("kl_coef")


@breaks
def more_entropy(runner):
    return _more("entropy_coef")


@breaks
def wider_clip(runner):
    return _more("clip_eps_high", factor=2.0)  # a tenth is within the gap between two tokens' ratios


@breaks
def larger_phi(runner):
    return patch.object(cases, "PHI", cases.PHI + 1)


@breaks
def more_balance_loss(runner):
    return patch.object(cases, "BALANCE_COEF", 1.1 * cases.BALANCE_COEF)


@breaks
def more_z_loss(runner):
    return patch.object(cases, "Z_LOSS_COEF", 1.1 * cases.Z_LOSS_COEF)


# ---- what the router losses are counted over --------------------------------------------------------------

@breaks
def padding_is_real(runner):
    return patch.object(BudgetRouter, "_real", staticmethod(lambda mask, logits: torch.ones(len(logits), 1)))


@breaks
def load_of_each_microbatch(runner):
    original = RouterLosses.begin_update
    return patch.object(RouterLosses, "begin_update",
                        lambda self, **options: original(self, **{**options, "load_fractions": {}}))


@breaks
def load_of_own_rank(runner):
    alone, _ = dist.new_subgroups(group_size=1)
    return patch.object(Topology, "tp_dp_cp_group", alone)


@breaks
def step_tokens_of_own_rank(runner):
    return patch.object(Topology, "sum_over_data", lambda self, tensor: None)


# ---- packing ----------------------------------------------------------------------------------------------

@breaks
def sequences_see_each_other(runner):
    """The attention takes the micro-batch for one sequence."""
    original = attention.runs_of

    def broken(batch, cp_size, cp_rank):
        ends = batch.cu_seqlens[[0, -1]]
        return dataclasses.replace(original(batch, cp_size, cp_rank), query_lengths=(batch.num_tokens,),
                                   key_lengths=(batch.num_tokens,), query_offsets=ends, key_offsets=ends)

    return patch.object(attention, "runs_of", broken)


# ---- tensor and sequence parallelism ----------------------------------------------------------------------

@breaks
@contextlib.contextmanager
def norm_gradient_of_own_tokens(runner):
    norms = [parameter for gpt in runner.policy.gpt_models for name, parameter in gpt.named_parameters()
             if "layernorm" in name]
    for parameter in norms:
        parameter.sequence_parallel = False
    yield
    for parameter in norms:
        parameter.sequence_parallel = True


@breaks
def head_scale_of_own_rows(runner):
    return patch.object(logprobs, "norm_head_norms", lambda weight, group: weight.norm(dim=0))


@breaks
def head_gradient_of_own_vocabulary(runner):
    gather = tensor_parallel.gather_from_sequence_parallel_region
    return patch.object(tensor_parallel, "gather_from_sequence_parallel_region",
                        lambda hidden, **_: gather(hidden, tensor_parallel_output_grad=False))


# ---- context parallelism ----------------------------------------------------------------------------------

@breaks
def sequences_cut_in_order(runner):
    """Rank r holds the r-th part of each sequence; attention and RoPE go on reckoning with mirrored chunks."""
    def in_order(span, cp_size, cp_rank):
        return torch.arange(span).chunk(cp_size)[cp_rank].numpy()

    return patch.object(sys.modules["megatron_rl.batch.pack"], "_positions", in_order)


@breaks
def rotation_by_place_on_the_rank(runner):
    original = attention.rotation
    return patch.object(attention, "rotation", lambda positions, model: original(
        torch.arange(len(positions), device=positions.device), model))


@breaks
def key_gradient_of_own_queries(runner):
    gather = attention.gather_from_sequence_parallel_region
    return patch.object(attention, "gather_from_sequence_parallel_region",
                        lambda x, group: gather(x, tensor_parallel_output_grad=False, group=group))


@breaks
def queries_see_every_key(runner):
    return patch.object(attention, "causal_lower_right", lambda queries, keys: None)
