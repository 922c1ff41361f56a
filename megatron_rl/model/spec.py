"""Megatron layer specs for each backend, with our router and routing replay in them.

model.backend=transformer_engine takes Megatron's Transformer Engine layers (te_spec.py). The other backends take its
local layers, with two modules of ours: Megatron's WrappedTorchNorm refuses sequence parallelism, and its local
DotProductAttention refuses packed (thd) input. Latent attention is ours too (latent_attention.py). Everything
else is megatron.core's own (SelfAttention, MoELayer, MLP).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import nn

from megatron_rl.model import attention
from megatron_rl.model.backend import WITH_DEVICE_COUNTS, Backend
from megatron_rl.model.kernel_layers import DeviceCountsMoELayer, KernelExperts, KernelRouter, SwiGLU
from megatron_rl.model.latent_attention import LatentSelfAttention
from megatron_rl.model.network import Network
from megatron_rl.model.overlap import OverlappedMoELayer, StartedAhead, StartedAheadWithDeviceCounts
from megatron_rl.model.router import BudgetRouter, RouterLosses
from megatron_rl.model.routing_replay import RoutedMoELayer, RoutedTransformerLayer


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 and rounded once: one kernel on CUDA, which keeps no fp32 copy of x.

    Marks its weight so that Megatron reduces its gradient under SP.
    """

    def __init__(self, config, hidden_size, eps=1e-6, **_):
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return F.rms_norm(x, self.shape, self.weight, self.eps)


def _moe(model: Network, losses: RouterLosses, backend: Backend, *, overlap: bool):
    """Experts and router are Megatron's own unless the backend's kernels name an implementation of ours."""
    local, kernels = LocalSpecProvider(), backend.kernels
    mlp = shared = MLPSubmodules(linear_fc1=local.column_parallel_linear(), linear_fc2=local.row_parallel_linear(),
                                 activation_func=_activation(backend))
    experts = partial(SequentialMLP, submodules=mlp) if kernels.experts == "megatron" else \
        partial(KernelExperts, submodules=mlp, impl=kernels.experts, pointwise=kernels.pointwise)
    if backend.name == "transformer_engine":
        grouped, shared = _te_spec().experts_and_shared()
        experts = grouped if kernels.experts == "transformer_engine" else experts
    router = BudgetRouter if kernels.router == "megatron" else partial(KernelRouter, impl=kernels.router)
    on_device = kernels.experts in WITH_DEVICE_COUNTS
    layer = DeviceCountsMoELayer if on_device else RoutedMoELayer
    if overlap:
        layer = partial(OverlappedMoELayer, dispatcher=StartedAheadWithDeviceCounts if on_device else StartedAhead)
    return partial(layer, submodules=MoESubmodules(
        experts=experts, shared_experts=partial(SharedExpertMLP, submodules=shared),
        router=partial(router, losses=losses, experts_ranking_a_group=model.experts_ranking_a_group)))


def _activation(backend: Backend):
    """What MLPSubmodules.activation_func builds; None: Megatron's separate operations of torch."""
    return SwiGLU if backend.kernels.pointwise == "triton" else None


def _te_spec():
    """The module, imported where Transformer Engine is asked for."""
    from megatron_rl.model import te_spec

    return te_spec


def layer_spec(model: Network, layer: int, losses: RouterLosses, backend: Backend, *,
               overlap: bool = False) -> ModuleSpec:
    """One layer, dense or MoE by its global number from 0. overlap: parallel.overlap_shared_experts."""
    num_experts = None if model.is_dense_layer(layer) else model.num_experts
    if backend.name == "transformer_engine":
        submodules = _te_spec().layer_submodules(num_experts=num_experts, qk_norm=model.qk_norm)
    else:
        submodules = _local_submodules(model, num_experts, backend)
    if num_experts is None:
        return ModuleSpec(module=TransformerLayer, submodules=submodules)
    submodules.mlp = _moe(model, losses, backend, overlap=overlap)
    return ModuleSpec(module=RoutedTransformerLayer, submodules=submodules)


def _local_submodules(model: Network, num_experts: int | None, backend: Backend) -> TransformerLayerSubmodules:
    submodules = get_gpt_layer_local_submodules(num_experts=num_experts, normalization="RMSNorm")
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    if num_experts is None:
        submodules.mlp.keywords["submodules"].activation_func = _activation(backend)
    core_attention = partial(
        attention.PackedSelfAttention, pointwise=backend.kernels.pointwise,
        attend=attention.attend_at_once if backend.attention_at_once else attention.attend_by_run)
    if model.kv_lora_rank:
        submodules.self_attention = ModuleSpec(
            LatentSelfAttention, params={"network": model, "norm": RMSNorm, "core_attention": core_attention})
        return submodules
    parts = submodules.self_attention.submodules
    parts.core_attention = core_attention
    parts.q_layernorm = parts.k_layernorm = RMSNorm if model.qk_norm else None
    return submodules


def block_spec(model: Network, config, losses: RouterLosses, backend: Backend, vp_stage: int | None, *,
               overlap: bool) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage holds, dense or MoE by their global number.

    overlap: parallel.overlap_shared_experts.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [layer_spec(model, layer, losses, backend, overlap=overlap) for layer in range(first, first + count)]
    norm = _te_spec().FINAL_NORM if backend.name == "transformer_engine" else RMSNorm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
