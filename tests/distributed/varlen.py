"""torch.nn.attention.varlen.varlen_attn (2.14.1) on a CPU: the same values, and no argument that it would refuse.

The rules are those of its documentation and of the flash attention below it (flash_attn/flash_api.cpp, mha_varlen_fwd).
"""

from __future__ import annotations

import torch

CALLS: list[tuple[int, int]] = []
"""Queries and keys of every call so far."""


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                enable_gqa=False):
    """[T_q, H_q, D], as the original: a causal mask is aligned to the last query and the last key of a sequence."""
    _check_heads(query, key, value, enable_gqa)
    lengths = [_lengths(*each) for each in ((query, cu_seq_q, max_q), (key, cu_seq_k, max_k))]
    assert cu_seq_q.shape == cu_seq_k.shape, "as many sequences of queries as of keys"
    assert window_size == (-1, 0), "the documentation's words for causal attention"
    CALLS.append((len(query), len(key)))
    group = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * (query.shape[2] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def _check_heads(query, key, value, enable_gqa: bool) -> None:
    assert query.dim() == key.dim() == 3 and key.shape == value.shape and query.shape[2] == key.shape[2]
    assert query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value)), "contiguous heads"
    assert query.shape[2] % 8 == 0 and query.shape[2] <= 256, "a head that flash attention takes"
    assert query.shape[1] % key.shape[1] == 0 and (enable_gqa or query.shape[1] == key.shape[1])


def _lengths(tensor: torch.Tensor, offsets: torch.Tensor, longest: int) -> list[int]:
    assert offsets.dtype is torch.int32 and offsets.dim() == 1 and offsets.is_contiguous()
    assert offsets.device == tensor.device
    lengths = offsets.diff().tolist()
    assert offsets[0] == 0 and offsets[-1] == len(tensor) and min(lengths) >= 0
    assert type(longest) is int and longest == max(lengths), "known to the host, and no more than it is"
    return lengths
