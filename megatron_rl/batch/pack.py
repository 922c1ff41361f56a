"""Lays sequences end to end and cuts them over the context-parallel ranks; the only place that shifts tokens.

A sequence of L tokens becomes L-1 positions: position t reads token t and predicts token t+1, and every per-token array
describes the predicted token. Under context parallelism each sequence is cut by itself. It is padded to a multiple of
2*cp and split into 2*cp equal chunks; rank r holds chunks r and 2*cp-1-r, so every rank attends to equally many keys
(megatron.core's rope_utils._get_thd_freqs_on_this_cp_rank counts on this order). T is padded to a multiple with one
extra sequence, because sequence parallelism shards T over the TP group. Padding is not `real`, carries no loss and is
hidden from the router losses.

One index, PackedMicrobatch.source, cuts all arrays: `lay_out` applies it, and `by_sample` undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_rl.types import PackedMicrobatch, TrainSample


def sequence_multiple(cp_size: int) -> int:
    """The positions of every sequence are padded to a multiple of this."""
    return 1 if cp_size == 1 else 2 * cp_size


def microbatch_multiple(cp_size: int, multiple_of: int) -> int:
    """The positions of a micro-batch over all cp_size ranks are padded to a multiple of this.

    multiple_of: the same for T on one rank.
    """
    return math.lcm(sequence_multiple(cp_size), cp_size * multiple_of)


def packed_tokens(lengths: Sequence[int], *, multiple_of: int, cp_size: int = 1) -> int:
    """T of a micro-batch of sequences of `lengths` positions, on each context-parallel rank."""
    unit = microbatch_multiple(cp_size, multiple_of)
    return max(unit, _ceil(sum(_ceil(length, sequence_multiple(cp_size)) for length in lengths), unit)) // cp_size


def _ceil(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def pack(samples: Sequence[TrainSample], *, multiple_of: int, cp_size: int = 1, cp_rank: int = 0, min_tokens: int = 0,
         device: torch.device | str = "cpu", experts_shape: tuple[int, int] | None = None,
         top_k: int = 0) -> PackedMicrobatch:
    """This context-parallel rank's PackedMicrobatch of `samples` (none: padding alone), T a multiple of multiple_of.

    min_tokens: the least T, if ranks must agree on one; it is packed_tokens of another micro-batch.
    experts_shape: (MoE layers M, experts per token k), if the samples' routed_experts are to be replayed. Padding takes
    the experts 0 .. k-1. Experts describe the token that is read, so they are not shifted.
    top_k: algo.distillation.top_k; the arrays of teachers then have k columns.
    """
    lengths = [len(sample.token_ids) - 1 for sample in samples]
    spans = [_ceil(length, sequence_multiple(cp_size)) for length in lengths]
    tokens = max(min_tokens, packed_tokens(lengths, multiple_of=multiple_of, cp_size=cp_size))
    if tokens * cp_size > sum(spans):
        spans.append(tokens * cp_size - sum(spans))
    positions = [_positions(span, cp_size, cp_rank) for span in spans]
    starts = np.cumsum([0, *lengths])  # of each sequence among the real positions; the last is that of padding
    source = torch.from_numpy(np.concatenate([
        np.where(places < length, start + places, -1)
        for places, length, start in zip(positions, [*lengths, 0], starts, strict=False)]))

    def joined(parts, dtype, fill=0):
        return lay_out(source, parts, dtype=dtype, fill=fill).to(device)

    def of_teachers(name: str, dtype, fill):
        row = np.full(top_k, fill, dtype) if top_k else fill
        found = [getattr(sample, name) for sample in samples]
        return joined([np.broadcast_to(row, (n, *np.shape(row))) if said is None else said[1:]
                       for n, said in zip(lengths, found, strict=True)], dtype, fill=row)

    return PackedMicrobatch(
        input_ids=joined([sample.token_ids[:-1] for sample in samples], np.int64),
        labels=joined([sample.token_ids[1:] for sample in samples], np.int64),
        position_ids=torch.from_numpy(np.concatenate(positions)).to(device),
        spans=tuple(spans),
        cu_seqlens=torch.tensor([0, *np.cumsum(spans)], dtype=torch.int32, device=device),
        loss_mask=joined([sample.loss_mask[1:] for sample in samples], np.bool_),
        real=(source >= 0).to(device),
        source=source.to(device),
        advantages=joined([np.full(n, s.advantage) for n, s in zip(lengths, samples, strict=True)], np.float32),
        rollout_logprobs=joined([sample.rollout_logprobs[1:] for sample in samples], np.float32),
        response_lengths=joined([np.full(n, s.num_response_tokens) for n, s in zip(lengths, samples, strict=True)],
                                np.float32, fill=1),
        sample_indices=tuple(sample.index for sample in samples),
        sample_lengths=tuple(lengths),
        routed_experts=None if experts_shape is None else joined(
            [sample.routed_experts for sample in samples], np.uint8,
            fill=np.broadcast_to(np.arange(experts_shape[1]), experts_shape)),
        sentence_ids=None if any(sample.sentences is None for sample in samples) else joined(
            _counted_on(samples), np.int64),
        teachers=joined([np.full(n, s.teacher) for n, s in zip(lengths, samples, strict=True)], np.int64, fill=-1),
        teacher_logprobs=of_teachers("teacher_logprobs", np.float32, np.nan),
        teacher_ids=of_teachers("teacher_ids", np.int64, 0) if top_k else None,
        second_labels=joined([np.append(sample.token_ids[2:], 0) for sample in samples], np.int64),
        second_mask=joined([np.append(sample.loss_mask[2:], False) for sample in samples], np.bool_))


def _counted_on(samples: Sequence[TrainSample]) -> list[np.ndarray]:
    """The sentences of each sequence behind those of the sequences before it, shifted."""
    counts = [int(sample.sentences.max()) + 1 for sample in samples]
    return [np.where(sample.loss_mask, sample.sentences + before, 0)[1:]
            for sample, before in zip(samples, np.cumsum([0, *counts]), strict=False)]


def _positions(span: int, cp_size: int, cp_rank: int) -> np.ndarray:
    """int64 [span / cp_size]: the positions of one sequence of `span` that this rank holds, in its order."""
    if cp_size == 1:
        return np.arange(span)
    chunks = np.arange(span).reshape(2 * cp_size, -1)
    return np.concatenate([chunks[cp_rank], chunks[-1 - cp_rank]])


def lay_out(source: torch.Tensor, parts: Sequence[np.ndarray], *, dtype, fill=0) -> torch.Tensor:
    """[T, ...] on the CPU: this rank's positions of per-sample arrays [L-1, ...], and `fill` on padding.

    source: PackedMicrobatch.source; parts: one array per sample, in its order; fill: a scalar or one row [...].
    """
    flat = np.concatenate([*(np.asarray(part, dtype=dtype) for part in parts),
                           np.full((1, *np.shape(fill)), fill, dtype=dtype)])
    return torch.from_numpy(flat[source.cpu().numpy()])  # -1, padding, is the last row


def by_sample(batch: PackedMicrobatch, values_T: torch.Tensor) -> list[torch.Tensor]:
    """Per-sample tensors [L-1, ...] of values_T [T, ...]; zero where another context-parallel rank holds the position.

    The inverse of `lay_out`: the sum of the results over the context-parallel ranks is whole.
    """
    flat = values_T.new_zeros(sum(batch.sample_lengths), *values_T.shape[1:])
    held = batch.source >= 0
    flat[batch.source[held]] = values_T[held]
    return list(flat.split(list(batch.sample_lengths)))
