"""Megatron layer specs without Transformer Engine: RMSNorm under sequence parallelism, packed SDPA attention.

Megatron's WrappedTorchNorm refuses sequence parallelism and its local DotProductAttention refuses packed (thd)
input, so these two modules are ours; everything else is megatron.core's own (SelfAttention, MoELayer, MLP).
Letters: T tokens of a micro-batch, H query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from megatron_rl.model.network import Network
from megatron_rl.model.router import BudgetRouter, RouterLosses
from megatron_rl.model.routing_replay import RoutedTransformerLayer


class RMSNorm(nn.Module):
    """x / rms(x) * weight in fp32; marks its weight so that Megatron reduces its gradient under SP."""

    def __init__(self, config, hidden_size, eps=1e-6, **_):
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return F.rms_norm(x.float(), self.shape, self.weight.float(), self.eps).to(x.dtype)


class PackedSelfAttention(nn.Module):
    """Causal SDPA, sequence by sequence; the core_attention of Megatron's SelfAttention.

    query [T, H, D], key and value [T, G, D]; packed_seq_params.cu_seqlens_q int32 [S+1] bounds the sequences over
    all context-parallel ranks. Returns [T, H*D].

    Under context parallelism this rank holds chunks r and 2*cp-1-r of each sequence (batch/pack.py). The keys and
    values of the whole micro-batch are gathered, 2 * cp*T * G * D numbers per layer that live until its backward
    pass, where their gradients are summed and scattered back (gather_from_sequence_parallel_region).
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None,
                 pg_collection=None, **_):
        super().__init__()
        if attention_type != "self" or attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"PackedSelfAttention is causal self attention, not {attention_type}/{attn_mask_type}")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = groups.cp
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None,
                packed_seq_params=None, **_):
        cp = self.cp_group.size()
        cu_seqlens = packed_seq_params.cu_seqlens_q
        lengths = ((cu_seqlens[1:] - cu_seqlens[:-1]) // cp).tolist()
        if cp == 1:
            parts = [self._attend(q, k, v) for q, k, v in
                     zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)]
        else:
            gathered = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=self.cp_group)
            ranks = gathered.unflatten(0, (cp, -1)).split(lengths, dim=1)
            parts = [part for q, kv in zip(query.split(lengths), ranks, strict=True) for part in self._chunks(q, kv)]
        return torch.cat(parts).flatten(1)

    def _chunks(self, q, kv):
        """Attention of this rank's two chunks of one sequence; q [L/cp, H, D], kv [cp, L/cp, G, 2D] of all ranks."""
        first, second = kv.chunk(2, dim=1)
        k, v = torch.cat([first.flatten(0, 1), second.flip(0).flatten(0, 1)]).chunk(2, dim=-1)
        rank, size = self.cp_group.rank(), len(q) // 2
        for part, chunk in zip(q.chunk(2), (rank, 2 * self.cp_group.size() - 1 - rank), strict=True):
            seen = (chunk + 1) * size
            yield self._attend(part, k[:seen], v[:seen])

    def _attend(self, q, k, v):
        """Queries are the last of the keys' positions; a query sees the keys up to its own."""
        mask = {"is_causal": True} if len(q) == len(k) else {"attn_mask": causal_lower_right(len(q), len(k))}
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=q.size(1) != k.size(1), **mask)
        return out[0].transpose(0, 1)


def _moe(losses: RouterLosses):
    backend = LocalSpecProvider()
    mlp = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear(),
                        activation_func=backend.activation_func())
    return partial(MoELayer, submodules=MoESubmodules(
        experts=backend.grouped_mlp_modules(False),
        shared_experts=partial(SharedExpertMLP, submodules=mlp),
        router=partial(BudgetRouter, losses=losses)))


def _layer(model: Network, layer: int, losses: RouterLosses) -> ModuleSpec:
    num_experts = None if model.is_dense_layer(layer) else model.num_experts
    submodules = get_gpt_layer_local_submodules(num_experts=num_experts, normalization="RMSNorm")
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedSelfAttention
    attention.q_layernorm = attention.k_layernorm = RMSNorm if model.qk_norm else None
    if num_experts is None:
        return ModuleSpec(module=TransformerLayer, submodules=submodules)
    submodules.mlp = _moe(losses)
    return ModuleSpec(module=RoutedTransformerLayer, submodules=submodules)


def block_spec(model: Network, config, losses: RouterLosses, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage holds, dense or MoE by their global number."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [_layer(model, layer, losses) for layer in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
