"""Packed causal attention: what a micro-batch tells every layer, the rotation of its positions, SDPA by sequence.

Megatron's own rotation of packed input runs sequence by sequence in every layer, and takes cosine and sine anew each
time (rope_utils._apply_rotary_pos_emb_thd, megatron-core 0.19.2). Here they are taken once for a micro-batch's
positions, so GPTModel is built without (position_embedding_type="none") and the core attention rotates.
Letters: T tokens of a micro-batch on this rank, H query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from megatron_rl.model.network import Network
from megatron_rl.model.routing_replay import MicrobatchRouting
from megatron_rl.types import PackedMicrobatch


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, which it hands to every layer, and what our layers need of it.

    spans: positions of each sequence over all context-parallel ranks; rotation: (cosine, sine), both fp32 [T, 1, D];
    routing: the experts that it records or replays (None: neither).
    """

    spans: tuple[int, ...] = ()
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    routing: MicrobatchRouting | None = None


def packed_sequences(batch: PackedMicrobatch, model: Network,
                     routing: MicrobatchRouting | None = None) -> PackedSequences:
    """What every layer of `model` needs to know of `batch`."""
    return PackedSequences(
        qkv_format="thd", cu_seqlens_q=batch.cu_seqlens, cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen, max_seqlen_kv=batch.max_seqlen, spans=batch.spans,
        rotation=rotation(batch.position_ids, model), routing=routing)


def rotation(position_ids_T: torch.Tensor, model: Network) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, fp32 [T, 1, D], of rotary embedding: angles position / factor * theta^(-2i/D), halves alike."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32, device=position_ids_T.device) / model.head_dim
    angles = torch.outer(position_ids_T.float() / model.rope_factor, 1.0 / model.rope_theta ** exponents)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """heads [T, H, D], turned in the plane of each dimension i of the first half and i + D/2: in fp32, rounded once."""
    first, second = heads.chunk(2, dim=-1)
    return (heads * cosine + torch.cat([-second, first], -1) * sine).to(heads.dtype)


class PackedSelfAttention(nn.Module):
    """Causal SDPA, sequence by sequence; the core_attention of Megatron's SelfAttention.

    query [T, H, D], key and value [T, G, D], not yet rotated; packed_seq_params: PackedSequences. Returns [T, H*D].

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
        lengths = [span // cp for span in packed_seq_params.spans]
        query, key = (rotate(heads, *packed_seq_params.rotation) for heads in (query, key))
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
