"""Both ways to attend to a micro-batch, on every context-parallel rank, against plain attention of whole sequences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_rl.batch import by_sample, pack
from megatron_rl.model import attention
from megatron_rl.types import TrainSample
from tests.distributed import varlen

LENGTHS = (5, 16, 9, 1)
HEADS, GROUPS, DIM, SCALE = 4, 2, 8, 0.3
WAYS = {"at_once": attention.attend_at_once, "by_run": attention.attend_by_run}


def batches(cp_size: int) -> list:
    """Of all context-parallel ranks, with alignment padding."""
    samples = [TrainSample(i, np.zeros(n + 1, np.int32), np.ones(n + 1, bool), np.zeros(n + 1, np.float32), 1.0, n)
               for i, n in enumerate(LENGTHS)]
    return [pack(samples, multiple_of=8, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)]


def drawn(heads: int, seed: int) -> torch.Tensor:
    """float64, the same number for a position of a sequence wherever it lies: [sum of LENGTHS, heads, DIM]."""
    return torch.randn(sum(LENGTHS), heads, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(query, key, value) -> list[torch.Tensor]:
    outputs = []
    for q, k, v in zip(*(tensor.split(LENGTHS) for tensor in (query, key, value)), strict=True):
        k, v = (tensor.repeat_interleave(HEADS // GROUPS, 1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
        seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return outputs


def on_rank(batch, values: torch.Tensor) -> torch.Tensor:
    """The rank's positions of `values`; padding is zero."""
    return torch.where((batch.source >= 0)[:, None, None], values[batch.source], 0.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_attention_of_all_ranks_is_that_of_the_whole_sequences(monkeypatch, way, cp_size):
    monkeypatch.setattr(attention, "varlen_attn", varlen.varlen_attn)
    query, key, value = drawn(HEADS, 0), drawn(GROUPS, 1), drawn(GROUPS, 2)
    ranks = batches(cp_size)
    keys, values = (torch.cat([on_rank(batch, each) for batch in ranks]) for each in (key, value))
    found = [torch.zeros(length, HEADS, DIM, dtype=torch.float64) for length in LENGTHS]
    for rank, batch in enumerate(ranks):
        runs = attention.runs_of(batch, cp_size, rank)
        k, v = (keys, values) if cp_size == 1 else (each.index_select(0, runs.key_rows) for each in (keys, values))
        before = len(varlen.CALLS)
        out = WAYS[way](on_rank(batch, query), k, v, runs, SCALE)
        assert len(varlen.CALLS) - before == (way == "at_once")
        found = [total + part for total, part in zip(found, by_sample(batch, out), strict=True)]
    for actual, expected in zip(found, plain(query, key, value), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # its softmax is float32


def wrong(runs: attention.Runs, **values) -> attention.Runs:
    return dataclasses.replace(runs, **values)


@pytest.mark.parametrize("broken", [
    lambda runs: wrong(runs, query_offsets=runs.query_offsets.long()),
    lambda runs: wrong(runs, key_offsets=runs.key_offsets[1:]),
    lambda runs: wrong(runs, query_offsets=runs.query_offsets - 1),
    lambda runs: wrong(runs, query_lengths=(max(runs.query_lengths) + 1,)),
    lambda runs: wrong(runs, key_lengths=tuple(torch.tensor(runs.key_lengths))),
])
def test_an_argument_that_the_documentation_does_not_allow_is_seen(monkeypatch, broken):
    """The stand-in for torch's call, which every layout of tests/distributed goes through, refuses it."""
    monkeypatch.setattr(attention, "varlen_attn", varlen.varlen_attn)
    (batch,) = batches(1)
    tensors = [torch.zeros(batch.num_tokens, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    runs = attention.runs_of(batch, 1, 0)
    attention.attend_at_once(*tensors, runs, SCALE)
    with pytest.raises(AssertionError):
        attention.attend_at_once(*tensors, broken(runs), SCALE)
