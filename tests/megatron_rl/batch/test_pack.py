"""The one shift: position t reads token t and everything else there describes token t+1; padding is nobody's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_rl.batch import by_sample, lay_out, pack
from megatron_rl.types import TrainSample


def sample(index: int, tokens, prompt: int, *, advantage: float = 0.0, response_tokens: int | None = None):
    tokens = np.asarray(tokens, dtype=np.int32)
    mask = np.arange(len(tokens)) >= prompt
    logprobs = np.where(mask, -tokens / 100.0, 0.0).astype(np.float32)  # each token carries its own name
    return TrainSample(index, tokens, mask, logprobs, advantage,
                       int(mask.sum()) if response_tokens is None else response_tokens)


TWO = [sample(4, [10, 11, 12, 13], 2, advantage=0.5, response_tokens=7), sample(2, [20, 21, 22], 1, advantage=-1.5)]


def test_two_sequences_by_hand():
    batch = pack(TWO, multiple_of=4)  # 3 + 2 positions, 3 of padding
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 0, 0, 0]
    assert batch.labels.tolist() == [11, 12, 13, 21, 22, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    # of 11 12 13 the response is 12 13; of 21 22 both
    assert batch.loss_mask.tolist() == [False, True, True, True, True, False, False, False]
    assert batch.rollout_logprobs.tolist() == pytest.approx([0.0, -0.12, -0.13, -0.21, -0.22, 0.0, 0.0, 0.0])
    assert batch.advantages.tolist() == [0.5, 0.5, 0.5, -1.5, -1.5, 0.0, 0.0, 0.0]
    assert batch.response_lengths.tolist() == [7.0, 7.0, 7.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    assert batch.real.tolist() == [True] * 5 + [False] * 3
    assert batch.sample_indices == (4, 2)
    assert (batch.num_tokens, batch.max_seqlen) == (8, 3)


def test_dtypes_of_the_contract():
    batch = pack(TWO, multiple_of=4)
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    assert {batch.loss_mask.dtype, batch.real.dtype} == {torch.bool}
    assert {batch.advantages.dtype, batch.rollout_logprobs.dtype, batch.response_lengths.dtype} == {torch.float32}


@pytest.mark.parametrize("seed", range(30))
def test_every_array_describes_the_predicted_token(seed):
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(int(rng.integers(1, 8))):
        length = int(rng.integers(2, 30))
        samples.append(sample(index, rng.integers(1, 100, length), int(rng.integers(1, length))))
    multiple = int(rng.integers(1, 9))
    batch = pack(samples, multiple_of=multiple)

    assert batch.num_tokens % multiple == 0
    assert int(batch.real.sum()) == sum(len(s.token_ids) - 1 for s in samples)
    assert int(batch.loss_mask.sum()) == sum(int(s.loss_mask.sum()) for s in samples), "no response token is lost"
    named = torch.where(batch.loss_mask, -batch.labels / 100.0, 0.0)
    torch.testing.assert_close(batch.rollout_logprobs, named)
    for place, one in enumerate(samples):
        start, end = batch.cu_seqlens[place:place + 2].tolist()
        assert batch.input_ids[start:end].tolist() == one.token_ids[:-1].tolist()
        assert batch.labels[start:end].tolist() == one.token_ids[1:].tolist()
        assert batch.loss_mask[start:end].tolist() == one.loss_mask[1:].tolist()
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        assert bool(batch.real[start:end].all())


@pytest.mark.parametrize("seed", range(10))
def test_padding_is_one_last_sequence_without_loss_and_not_real(seed):
    rng = np.random.default_rng(seed)
    samples = [sample(i, rng.integers(1, 100, int(rng.integers(2, 9))), 1) for i in range(3)]
    batch = pack(samples, multiple_of=16)
    padding = batch.num_tokens - sum(len(s.token_ids) - 1 for s in samples)
    assert padding < 16
    assert len(batch.cu_seqlens) == 1 + len(samples) + (padding > 0)
    assert int(batch.cu_seqlens[-1]) == batch.num_tokens
    if padding:
        tail = slice(batch.num_tokens - padding, None)
        assert not batch.real[tail].any() and not batch.loss_mask[tail].any()
        assert bool((batch.response_lengths[tail] > 0).all()), "grpo divides by it"


def test_no_padding_adds_no_sequence():
    batch = pack(TWO, multiple_of=5)
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert bool(batch.real.all())


def test_no_samples_is_a_micro_batch_of_padding():
    batch = pack([], multiple_of=4)
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.input_ids.tolist() == batch.labels.tolist() == [0, 0, 0, 0]
    assert not batch.real.any() and not batch.loss_mask.any()
    assert batch.sample_indices == ()


def test_experts_describe_the_token_that_is_read_and_padding_takes_the_first_ones():
    experts = [np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2) + 10 * i for i, n in enumerate((3, 2), start=1)]
    samples = [dataclasses.replace(s, routed_experts=e) for s, e in zip(TWO, experts, strict=True)]
    batch = pack(samples, multiple_of=4, experts_shape=(2, 2))
    assert batch.routed_experts.dtype == torch.uint8
    assert batch.routed_experts.tolist() == [*experts[0].tolist(), *experts[1].tolist(), *[[[0, 1], [0, 1]]] * 3]
    assert pack([], multiple_of=2, experts_shape=(1, 3)).routed_experts.tolist() == [[[0, 1, 2]]] * 2
    assert pack(samples, multiple_of=4).routed_experts is None


def test_context_parallel_ranks_hold_mirrored_chunks_of_each_sequence():
    # cp 2: 3 positions are padded to 4, 5 to 8, cut in 4 chunks of 1 and of 2; T on a rank is 6, 8 with a padding of 4
    samples = [sample(7, [10, 11, 12, 13], 2), sample(3, [20, 21, 22, 23, 24, 25], 1)]
    first, second = (pack(samples, multiple_of=4, cp_size=2, cp_rank=rank) for rank in (0, 1))
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 4, 12, 16]
    assert (first.num_tokens, first.max_seqlen) == (8, 8)
    assert first.position_ids.tolist() == [0, 3, 0, 1, 6, 7, 0, 3]
    assert second.position_ids.tolist() == [1, 2, 2, 3, 4, 5, 1, 2]
    assert first.input_ids.tolist() == [10, 0, 20, 21, 0, 0, 0, 0]
    assert second.input_ids.tolist() == [11, 12, 22, 23, 24, 0, 0, 0]
    assert first.labels.tolist() == [11, 0, 21, 22, 0, 0, 0, 0]
    assert second.labels.tolist() == [12, 13, 23, 24, 25, 0, 0, 0]
    assert first.real.tolist() == [True, False, True, True, False, False, False, False]
    assert first.loss_mask.tolist() == [False, False, True, True, False, False, False, False]
    assert second.loss_mask.tolist() == [True] * 5 + [False] * 3
    assert second.source.tolist() == [1, 2, 5, 6, 7, -1, -1, -1]
    assert (first.sample_indices, first.sample_lengths) == ((7, 3), (3, 5))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_laid_out_over_ranks_comes_back_by_sample(seed):
    rng = np.random.default_rng(seed)
    samples = [sample(i, rng.integers(1, 100, int(rng.integers(2, 30))), 1) for i in range(int(rng.integers(0, 6)))]
    values = [rng.normal(size=(len(s.token_ids) - 1, 2)) for s in samples]
    cp_size, multiple = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    whole = [torch.zeros(len(value), 2, dtype=torch.float64) for value in values]
    for rank in range(cp_size):
        batch = pack(samples, multiple_of=multiple, cp_size=cp_size, cp_rank=rank)
        assert batch.num_tokens % multiple == 0 and batch.num_tokens * cp_size == int(batch.cu_seqlens[-1])
        laid = lay_out(batch.source, values, dtype=np.float64, fill=[9.0, 9.0])
        assert bool((laid[~batch.real] == 9.0).all())
        for total, part in zip(whole, by_sample(batch, laid), strict=True):
            total += part
    for total, value in zip(whole, values, strict=True):
        np.testing.assert_array_equal(total, value)


@pytest.mark.parametrize(("cp_size", "multiple"), [(2, 1), (2, 4), (3, 2), (4, 8)])
def test_no_padding_beyond_what_alignment_needs(cp_size, multiple):
    samples = [sample(i, np.arange(1, length + 2), 1) for i, length in enumerate((1, 2, 7, 8, 9, 30))]
    batch = pack(samples, multiple_of=multiple, cp_size=cp_size)
    each = 2 * cp_size
    padded = sum(-(-length // each) * each for length in batch.sample_lengths)
    assert padded <= int(batch.cu_seqlens[-1]) < padded + np.lcm(each, cp_size * multiple)
