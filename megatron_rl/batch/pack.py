"""Sequences laid end to end, and the only place where tokens are shifted against their labels.

A sequence of L tokens becomes L-1 positions: position t reads token t and predicts token t+1, and every
per-token array describes the predicted token. T is padded to a multiple (sequence parallelism shards T over
the TP group) with one extra sequence that is not `real`, carries no loss and is hidden from the router losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_rl.types import PackedMicrobatch, TrainSample


def pack(samples: Sequence[TrainSample], *, multiple_of: int, device: torch.device | str = "cpu",
         experts_shape: tuple[int, int] | None = None) -> PackedMicrobatch:
    """PackedMicrobatch of `samples` (may be empty: then padding alone), T a positive multiple of `multiple_of`.

    experts_shape: (MoE layers M, experts per token k), when the samples' routed_experts are to be replayed; padding
    takes the experts 0 .. k-1. Those describe the token that is read, so they are not shifted.
    """
    lengths = [len(sample.token_ids) - 1 for sample in samples]
    real_tokens = sum(lengths)
    padding = (-real_tokens) % multiple_of or (multiple_of if real_tokens == 0 else 0)
    spans = lengths + ([padding] if padding else [])

    def joined(parts, dtype, fill=0):
        tail = [np.full((padding, *np.shape(fill)), fill, dtype=dtype)]
        return torch.from_numpy(np.concatenate([np.asarray(p, dtype=dtype) for p in parts] + tail)).to(device)

    mask = joined([sample.loss_mask[1:] for sample in samples], np.bool_)
    return PackedMicrobatch(
        input_ids=joined([sample.token_ids[:-1] for sample in samples], np.int64),
        labels=joined([sample.token_ids[1:] for sample in samples], np.int64),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in spans]).astype(np.int64)).to(device),
        cu_seqlens=torch.tensor([0, *np.cumsum(spans)], dtype=torch.int32, device=device),
        loss_mask=mask,
        real=joined([np.ones(n) for n in lengths], np.bool_),
        advantages=joined([np.full(n, s.advantage) for n, s in zip(lengths, samples, strict=True)], np.float32),
        rollout_logprobs=joined([sample.rollout_logprobs[1:] for sample in samples], np.float32),
        response_lengths=joined([np.full(n, s.num_response_tokens) for n, s in zip(lengths, samples, strict=True)],
                                np.float32, fill=1),
        sample_indices=tuple(sample.index for sample in samples),
        routed_experts=None if experts_shape is None else joined(
            [sample.routed_experts for sample in samples], np.uint8,
            fill=np.broadcast_to(np.arange(experts_shape[1]), experts_shape)))
