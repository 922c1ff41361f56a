"""Packed causal attention: what a micro-batch tells every layer, the rotation of its positions, one call per layer.

Megatron's own rotation of packed input runs sequence by sequence in every layer, and takes cosine and sine anew each
time (rope_utils._apply_rotary_pos_emb_thd, megatron-core 0.19.2). Here they are taken once for a micro-batch's
positions, so GPTModel is built without (position_embedding_type="none") and the core attention rotates.
Letters: T tokens of a micro-batch on this rank, K keys that its queries see, R runs, H query heads, G key-value heads,
D head dimension, V that of values (D, but for latent attention).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from megatron_rl.model.network import Network
from megatron_rl.model.rope import inverse_frequencies
from megatron_rl.model.routing_replay import MicrobatchRouting
from megatron_rl.types import PackedMicrobatch
from rl_kernels.pointwise import Implementation as Pointwise
from rl_kernels.pointwise import rotate


@dataclass(frozen=True)
class Runs:
    """Which keys the queries of a micro-batch see. Both lie in R runs, end to end; run i sees run i.

    A run's queries are the last positions of its keys, and each sees the keys up to its own. A run is a sequence, or
    one of a sequence's two chunks on this context-parallel rank.

    - query_lengths, key_lengths: of the runs, known to the host, so no layer asks the device for them.
    - query_offsets, key_offsets: int32 [R+1], their bounds, on the device.
    - key_rows: int64 [K], where each key lies among those of all context-parallel ranks, [cp * T]. None: cp is 1.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    key_rows: torch.Tensor | None = None


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Runs, float], torch.Tensor]
"""(query [T, H, D], key [K, G, D], value [K, G, D], runs, scale) -> [T, H, D]."""


def attend_at_once(query, key, value, runs: Runs, scale: float) -> torch.Tensor:
    """All runs in one call of torch's flash attention, which takes 16-bit tensors on CUDA.

    Its causal mask is aligned to the last query and the last key of a run. It asks for window_size=(-1, 0), int32
    offsets on the device and the longest runs as Python ints (torch.nn.attention.varlen, 2.14.1).
    """
    return varlen_attn(query, key, value, runs.query_offsets, runs.key_offsets, max(runs.query_lengths),
                       max(runs.key_lengths), scale=scale, window_size=(-1, 0),
                       enable_gqa=query.size(1) != key.size(1))


def attend_by_run(query, key, value, runs: Runs, scale: float) -> torch.Tensor:
    """SDPA, run by run: any device and dtype."""
    return torch.cat([attend_to(q, k, v, scale) for q, k, v in zip(
        query.split(runs.query_lengths), key.split(runs.key_lengths), value.split(runs.key_lengths), strict=True)])


def attend_to(query, key, value, scale: float) -> torch.Tensor:
    """One run."""
    mask = {"is_causal": True} if len(query) == len(key) else {"attn_mask": causal_lower_right(len(query), len(key))}
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.size(1) != k.size(1), **mask)
    return out[0].transpose(0, 1)


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, which it hands to every layer, and what our layers need of it.

    runs: what each query sees; rotation: (cosine, sine), both fp32 [T, 1, d] (`rotation`); routing: the experts that it
    records or replays (None: neither).
    """

    runs: Runs | None = None
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    routing: MicrobatchRouting | None = None


def packed_sequences(batch: PackedMicrobatch, model: Network, routing: MicrobatchRouting | None = None, *,
                     cp_size: int = 1, cp_rank: int = 0) -> PackedSequences:
    """What every layer of `model` needs to know of `batch` on this context-parallel rank.

    The bounds are those of whole sequences. Transformer Engine reads them (te_spec.py), our attention reads `runs`.
    """
    bounds = batch.cu_seqlens
    return PackedSequences(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds, pad_between_seqs=False,
        max_seqlen_q=batch.max_seqlen, max_seqlen_kv=batch.max_seqlen, runs=runs_of(batch, cp_size, cp_rank),
        rotation=rotation(batch.position_ids, model), routing=routing)


def runs_of(batch: PackedMicrobatch, cp_size: int, cp_rank: int) -> Runs:
    """Under context parallelism this rank holds chunks r and 2*cp-1-r of each sequence (batch/pack.py)."""
    if cp_size == 1:
        return Runs(batch.spans, batch.spans, batch.cu_seqlens, batch.cu_seqlens)
    last = 2 * cp_size - 1
    query_lengths, key_lengths, rows, start = [], [], [], 0
    for span in batch.spans:
        size = span // (2 * cp_size)
        rows_of_chunk = [min(chunk, last - chunk) * batch.num_tokens + start + (chunk >= cp_size) * size
                         + np.arange(size) for chunk in range(2 * cp_size)]
        for chunk in (cp_rank, last - cp_rank):
            query_lengths.append(size)
            key_lengths.append((chunk + 1) * size)
            rows += rows_of_chunk[:chunk + 1]
        start += 2 * size
    device = batch.cu_seqlens.device
    offsets = [_on_device(np.cumsum([0, *lengths]), torch.int32, device) for lengths in (query_lengths, key_lengths)]
    return Runs(tuple(query_lengths), tuple(key_lengths), *offsets,
                _on_device(np.concatenate(rows), torch.int64, device))


def _on_device(numbers: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copied without waiting for the device."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def rotation(position_ids_T: torch.Tensor, model: Network) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, fp32 [T, 1, d], of rotary embedding (rope.py), halves alike, times YaRN's attention factor.

    d: model.rotary_dim, or D if that is 0.
    """
    angles = torch.outer(position_ids_T.float(), inverse_frequencies(
        model.rope, model.rope_theta, model.rotary_dim or model.head_dim, position_ids_T.device))
    angles = torch.cat([angles, angles], -1)[:, None]
    factor = model.rope.attention_factor
    return angles.cos() * factor, angles.sin() * factor


class PackedSelfAttention(nn.Module):
    """Causal attention of a packed micro-batch, by `attend`; the core_attention of Megatron's SelfAttention.

    query [T, H, D], key [T, G, D], not yet rotated, value [T, G, V]; packed_seq_params: PackedSequences. Returns
    [T, H*V].

    Values narrower than keys are widened with zeros and what comes of these is cut off, because flash attention takes
    one width; SDPA would write all scores.

    Under context parallelism the keys and values of the whole micro-batch are gathered. Those that this rank's two
    chunks of each sequence see are picked out, (2*cp+1) * T * G * D numbers per layer that live until its backward
    pass, where their gradients are summed and scattered back (gather_from_sequence_parallel_region).
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None,
                 pg_collection=None, *, attend: Attend, pointwise: Pointwise = "torch", **_):
        super().__init__()
        if attention_type != "self" or attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"PackedSelfAttention is causal self attention, not {attention_type}/{attn_mask_type}")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group, self.attend, self.pointwise = groups.cp, attend, pointwise
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None,
                packed_seq_params=None, **_):
        runs = packed_seq_params.runs
        width = value.size(-1)
        value = F.pad(value, (0, key.size(-1) - width)) if width < key.size(-1) else value
        query, key = (rotate(heads, *packed_seq_params.rotation, impl=self.pointwise) for heads in (query, key))
        if runs.key_rows is not None:
            gathered = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=self.cp_group)
            key, value = gathered.index_select(0, runs.key_rows).chunk(2, dim=-1)
        return self.attend(query, key, value, runs, self.scale)[..., :width].flatten(1)
