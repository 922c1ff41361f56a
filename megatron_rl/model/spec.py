"""Megatron layer specs without Transformer Engine: RMSNorm under sequence parallelism, packed attention.

Megatron's WrappedTorchNorm refuses sequence parallelism and its local DotProductAttention refuses packed (thd)
input, so these two modules are ours; everything else is megatron.core's own (SelfAttention, MoELayer, MLP).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import nn

from megatron_rl.config.schema import KernelConfig
from megatron_rl.model import attention
from megatron_rl.model.backend import Backend
from megatron_rl.model.kernel_layers import WITH_DEVICE_COUNTS, DeviceCountsMoELayer, KernelExperts, KernelRouter
from megatron_rl.model.network import Network
from megatron_rl.model.router import BudgetRouter, RouterLosses
from megatron_rl.model.routing_replay import RoutedTransformerLayer


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


def _moe(losses: RouterLosses, kernels: KernelConfig):
    """Experts and router are Megatron's own unless `kernels` names an implementation of ours."""
    local = LocalSpecProvider()
    mlp = MLPSubmodules(linear_fc1=local.column_parallel_linear(), linear_fc2=local.row_parallel_linear(),
                        activation_func=local.activation_func())
    experts = local.grouped_mlp_modules(False) if kernels.experts == "megatron" else \
        partial(KernelExperts, submodules=mlp, impl=kernels.experts)
    router = BudgetRouter if kernels.router == "megatron" else partial(KernelRouter, impl=kernels.router)
    layer = DeviceCountsMoELayer if kernels.experts in WITH_DEVICE_COUNTS else MoELayer
    return partial(layer, submodules=MoESubmodules(
        experts=experts, shared_experts=partial(SharedExpertMLP, submodules=mlp),
        router=partial(router, losses=losses)))


def _layer(model: Network, layer: int, losses: RouterLosses, backend: Backend) -> ModuleSpec:
    num_experts = None if model.is_dense_layer(layer) else model.num_experts
    submodules = get_gpt_layer_local_submodules(num_experts=num_experts, normalization="RMSNorm")
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    parts = submodules.self_attention.submodules
    parts.core_attention = partial(attention.PackedSelfAttention, attend=(
        attention.attend_at_once if backend.attention_at_once else attention.attend_by_run))
    parts.q_layernorm = parts.k_layernorm = RMSNorm if model.qk_norm else None
    if num_experts is None:
        return ModuleSpec(module=TransformerLayer, submodules=submodules)
    submodules.mlp = _moe(losses, backend.kernels)
    return ModuleSpec(module=RoutedTransformerLayer, submodules=submodules)


def block_spec(model: Network, config, losses: RouterLosses, backend: Backend,
               vp_stage: int | None) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage holds, dense or MoE by their global number."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [_layer(model, layer, losses, backend) for layer in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
