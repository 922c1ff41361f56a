"""Both ways to attend to a micro-batch, on every context-parallel rank, against plain attention of whole sequences."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

from megatron_rl.batch import by_sample, pack
from megatron_rl.model import attention
from megatron_rl.types import TrainSample
from tests.distributed import varlen

LENGTHS = (5, 16, 9, 1)
HEADS, GROUPS, DIM, SCALE = 4, 2, 8, 0.3
WAYS = {"at_once": attention.attend_at_once, "by_run": attention.attend_by_run}


def batches(cp_size: int) -> list:
    """One micro-batch for each context-parallel rank, with alignment padding."""
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
def test_attention_of_all_ranks_is_that_of_the_whole_sequences(way, cp_size):
    """With its gradients, of a loss that every position enters with a weight of its own."""
    query, key, value = (drawn(heads, seed).requires_grad_() for seed, heads in enumerate((HEADS, GROUPS, GROUPS)))
    ranks, mix = batches(cp_size), drawn(HEADS, 3)
    keys, values = (torch.cat([on_rank(batch, each) for batch in ranks]) for each in (key, value))
    found = [torch.zeros(length, HEADS, DIM, dtype=torch.float64) for length in LENGTHS]
    for rank, batch in enumerate(ranks):
        runs = attention.runs_of(batch, cp_size, rank)
        k, v = (keys, values) if cp_size == 1 else (each.index_select(0, runs.key_rows) for each in (keys, values))
        before = len(varlen.CALLS)
        out = WAYS[way](on_rank(batch, query), k, v, runs, SCALE)
        assert len(varlen.CALLS) - before == (way == "at_once")
        found = [total + part for total, part in zip(found, by_sample(batch, out), strict=True)]
    expected = torch.cat(plain(query, key, value))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad((out * mix).sum(), (query, key, value)) for out in (torch.cat(found), expected)]
    for actual, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_call_gets_what_its_documentation_asks_for(monkeypatch, cp_size):
    """Above all longest sequences that the host knows: torch would read a tensor, and so wait for the device."""
    asked = []

    def recorded(*args, **kwargs):
        asked.append(inspect.signature(torch_varlen.varlen_attn).bind(*args, **kwargs).arguments)
        return torch_varlen.varlen_attn(*args, **kwargs)

    monkeypatch.setattr(attention, "varlen_attn", recorded)
    batch = batches(cp_size)[-1]
    runs = attention.runs_of(batch, cp_size, cp_size - 1)
    queries, keys, sequences = batch.num_tokens, sum(runs.key_lengths), len(runs.query_lengths)
    attention.attend_at_once(*(torch.zeros(rows, heads, DIM) for rows, heads in
                               ((queries, HEADS), (keys, GROUPS), (keys, GROUPS))), runs, SCALE)
    (call,) = asked
    assert {name: call[name].shape for name in ("query", "key", "value")} == {
        "query": (queries, HEADS, DIM), "key": (keys, GROUPS, DIM), "value": (keys, GROUPS, DIM)}
    for offsets, longest, total in (("cu_seq_q", "max_q", queries), ("cu_seq_k", "max_k", keys)):
        assert call[offsets].dtype is torch.int32 and call[offsets].shape == (sequences + 1,)
        assert call[offsets].device == batch.input_ids.device
        assert type(call[longest]) is int and call[longest] == int(call[offsets].diff().max())
        assert (int(call[offsets][0]), int(call[offsets][-1])) == (0, total)
    assert {name: call[name] for name in call.keys() - {
        "query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"}} == {
        "scale": SCALE, "window_size": (-1, 0), "enable_gqa": True}


def wrong(runs: attention.Runs, **values) -> attention.Runs:
    return dataclasses.replace(runs, **values)


@pytest.mark.parametrize("broken", [
    lambda runs: wrong(runs, query_offsets=runs.query_offsets.long()),
    lambda runs: wrong(runs, key_offsets=runs.key_offsets[1:]),
    lambda runs: wrong(runs, query_offsets=runs.query_offsets - 1),
    lambda runs: wrong(runs, query_lengths=(max(runs.query_lengths) + 1,)),
])
def test_an_argument_that_the_documentation_does_not_allow_is_seen(broken):
    """The kernels that every layout of tests/distributed goes through refuse it."""
    (batch,) = batches(1)
    tensors = [torch.zeros(batch.num_tokens, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    runs = attention.runs_of(batch, 1, 0)
    attention.attend_at_once(*tensors, runs, SCALE)
    with pytest.raises(AssertionError):
        attention.attend_at_once(*tensors, broken(runs), SCALE)
