"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, Section 2.1) of a packed micro-batch.

Keys and values come from one narrow latent vector of a token; queries may come from another. A small part of each head
rotates, and all heads share this part of the key.

Megatron-Core 0.19.2 has MLASelfAttention (transformer/multi_latent_attention.py). It is not used here:

- It rotates sequence by sequence, in each layer, with cosines of its own; attention.py takes them once.
- Without Transformer Engine its down-projections are column-parallel: rows that must divide by parallel.tp, gathered
  and scattered again in each layer. The shared part of the key is gathered by an operation whose backward pass only
  cuts (gather_from_tensor_model_parallel_region), so its gradient lacks the heads of the other ranks.

The parameters have the names of Megatron's class. Letters: T tokens, t of them on this rank under sequence parallelism,
H heads of this rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_rl.model.network import Network


class WholeLinear(nn.Module):
    """x W^T with W [out, in] on every tensor-parallel rank. Marks W so that Megatron reduces its gradient under SP."""

    def __init__(self, inputs: int, outputs: int, config):
        super().__init__()
        self.is_expert, self.sequence_parallel = False, config.sequence_parallel
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=config.params_dtype))
        self.weight.allreduce, self.weight.sequence_parallel = True, config.sequence_parallel

    def forward(self, x):
        return F.linear(x, self.weight)


class LatentSelfAttention(MegatronModule):
    """The self_attention of Megatron's TransformerLayer, for a `network` with kv_lora_rank.

    norm: builds an RMSNorm; core_attention: builds what attends (attention.PackedSelfAttention), which rotates the
    leading dimensions of a head. Checkpoints have the rotating dimensions last and in pairs (2i, 2i + 1); here they
    come first, halves apart, in queries and keys alike, which changes no product of the two.
    """

    def __init__(self, config, layer_number, attn_mask_type=AttnMaskType.causal, pg_collection=None, *,
                 network: Network, norm, core_attention, **_):
        super().__init__(config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group, self.network = groups.tp, network
        heads, hidden, latent = network.num_attention_heads, network.hidden_size, network.kv_lora_rank
        columns = {"config": config, "init_method": config.init_method, "bias": False, "gather_output": False,
                   "tp_group": groups.tp}
        if network.q_lora_rank:
            self.linear_q_down_proj = WholeLinear(hidden, network.q_lora_rank, config)
            self.q_layernorm = norm(config=config, hidden_size=network.q_lora_rank, eps=config.layernorm_epsilon)
            self.linear_q_up_proj = ColumnParallelLinear(network.q_lora_rank, heads * network.head_dim, **columns)
        else:
            self.linear_q_proj = ColumnParallelLinear(hidden, heads * network.head_dim, **columns)
        self.linear_kv_down_proj = WholeLinear(hidden, latent + network.qk_rope_head_dim, config)
        self.kv_layernorm = norm(config=config, hidden_size=latent, eps=config.layernorm_epsilon)
        self.linear_kv_up_proj = ColumnParallelLinear(
            latent, heads * (network.qk_nope_head_dim + network.v_head_dim), **columns)
        self.core_attention = core_attention(
            config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, attention_type="self",
            softmax_scale=network.softmax_scale, pg_collection=groups)
        self.linear_proj = RowParallelLinear(
            heads * network.v_head_dim, hidden, config=config, init_method=config.output_layer_init_method, bias=False,
            input_is_parallel=True, skip_bias_add=True, tp_group=groups.tp)

    def forward(self, hidden_states, attention_mask=None, *, packed_seq_params, **_):
        """([t, 1, hidden], None); hidden_states [t, 1, hidden], packed_seq_params: attention.PackedSequences."""
        sizes = self.network
        latent, key_rotating = self.linear_kv_down_proj(hidden_states).split(
            [sizes.kv_lora_rank, sizes.qk_rope_head_dim], -1)
        query = self._heads(self._query(hidden_states))
        key_value = self._heads(self.linear_kv_up_proj(self.kv_layernorm(latent))[0])
        query_still, query_rotating = query.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], -1)
        key_still, value = key_value.split([sizes.qk_nope_head_dim, sizes.v_head_dim], -1)
        key_rotating = _halves_apart(self._for_all_heads(key_rotating)).expand(-1, key_still.size(1), -1)
        out = self.core_attention(
            torch.cat([_halves_apart(query_rotating), query_still], -1), torch.cat([key_rotating, key_still], -1),
            value, attention_mask, packed_seq_params=packed_seq_params)
        return self.linear_proj(out[:, None])

    def _query(self, hidden_states):
        if not self.network.q_lora_rank:
            return self.linear_q_proj(hidden_states)[0]
        return self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))[0]

    def _heads(self, rows):
        """[T, H, D] of [T, 1, H*D]."""
        return rows.view(len(rows), self.network.num_attention_heads // self.tp_group.size(), -1)

    def _for_all_heads(self, key_rotating):
        """[T, 1, d] of [t, 1, d]. Each rank's gradient is of its own heads; the backward pass adds them."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(key_rotating, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(key_rotating, group=self.tp_group)


def _halves_apart(pairs):
    """(x0, x1, x2, x3, ...) -> (x0, x2, ..., x1, x3, ...): plane i turns dimensions i and i + d/2, as `rotate` does."""
    return torch.cat([pairs[..., 0::2], pairs[..., 1::2]], -1)
