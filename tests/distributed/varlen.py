"""A CPU's kernels for torch.nn.attention.varlen.varlen_attn (2.14.1), which refuse what a GPU's would.

The rules are those of its documentation and of the flash attention below it (flash_attn/flash_api.cpp, mha_varlen_fwd).
Whoever imports this module can call varlen_attn on a CPU; its own gradient formula calls the second kernel.
"""

from __future__ import annotations

import torch
from torch.nn.attention import varlen

CALLS: list[tuple[int, int]] = []
"""Queries and keys of every forward call so far."""


@varlen._varlen_attn.register_kernel("cpu")
def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None,
            enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    """(output [T_q, H_q, D], log-sum-exp fp32 [H_q, T_q], state of a generator)."""
    assert seqused_k is block_table is None, "these have no gradient"
    assert is_causal and window_size == [-1, 0], "the documentation's words for causal attention"
    assert query.shape[1] == key.shape[1] or enable_gqa
    sequences = _sequences(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    CALLS.append((len(query), len(key)))
    output, logsumexp = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for queries, keys in sequences:
        scores, _, v = _scores(query[queries], key[keys], value[keys], scale)
        logsumexp[:, queries] = scores.logsumexp(-1).float()
        output[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(query.dtype)
    return output, logsumexp, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def backward(grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state, scale=None,
             window_size=None):
    """Gradients of query, key and value."""
    assert is_causal and window_size == [-1, 0] and grad_out.shape == out.shape == query.shape
    factor, group = _factor(query, scale), query.shape[1] // key.shape[1]
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for queries, keys in _sequences(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        scores, k, v = _scores(query[queries], key[keys], value[keys], scale)
        weights, grad = scores.softmax(-1), grad_out[queries].to(scores.dtype)
        grad_weights = torch.einsum("qhd,khd->hqk", grad, v)
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        grads[0][queries] = (torch.einsum("hqk,khd->qhd", grad_scores, k) * factor).to(query.dtype)
        for found, rows in ((grads[1], torch.einsum("hqk,qhd->khd", grad_scores, query[queries].to(k.dtype)) * factor),
                            (grads[2], torch.einsum("hqk,qhd->khd", weights, grad))):
            found[keys] = rows.unflatten(1, (-1, group)).sum(2).to(key.dtype)
    return tuple(grads)


def _factor(query, scale) -> float:
    return query.shape[2] ** -0.5 if scale is None else scale


def _scores(query, key, value, scale):
    """Masked scores [H, queries, keys] of one sequence, and the keys and values of each query head, float32 or wider.

    The mask is aligned to the last query and the last key.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    k, v = (tensor.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    seen = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
    scores = torch.einsum("qhd,khd->hqk", query.to(dtype), k) * _factor(query, scale)
    return scores.masked_fill(~seen, -torch.inf), k, v


def _sequences(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k) -> list[tuple[slice, slice]]:
    """Rows of the queries and of the keys of each sequence. AssertionError for what the GPU's kernels would refuse."""
    assert query.dim() == key.dim() == 3 and key.shape == value.shape and query.shape[2] == key.shape[2]
    assert query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value)), "contiguous heads"
    assert query.shape[2] % 8 == 0 and query.shape[2] <= 256, "a head that flash attention takes"
    assert query.shape[1] % key.shape[1] == 0
    assert cu_seq_q.shape == cu_seq_k.shape, "as many sequences of queries as of keys"
    rows = []
    for tensor, offsets, longest in ((query, cu_seq_q, max_q), (key, cu_seq_k, max_k)):
        assert offsets.dtype is torch.int32 and offsets.dim() == 1 and offsets.is_contiguous()
        assert offsets.device == tensor.device
        ends = offsets.tolist()
        rows.append([slice(*pair) for pair in zip(ends, ends[1:], strict=False)])
        assert ends[0] == 0 and ends[-1] == len(tensor) and ends == sorted(ends)
        assert type(longest) is int and longest == max(each.stop - each.start for each in rows[-1])
    return list(zip(*rows, strict=True))
