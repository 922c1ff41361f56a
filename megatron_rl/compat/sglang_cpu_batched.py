"""SGLang's decoding on a CPU, a batch at a time: the two loops that take two thirds of it.

Written for SGLang 0.5.23, whose fallbacks for a CPU without its compiled kernels loop over sequences
(layers/attention/torch_native_backend.py: _run_sdpa_forward_decode) and experts (layers/moe/fused_moe_native.py). Here
the sequences of about one length attend in one call, and the experts of a layer are two grouped products.
compat/sglang_cpu.py hangs these functions around SGLang's own, which get every case that is not treated here. Delete
when sgl-kernel has a CPU wheel.

Letters: B sequences, n of them in a group, L tokens of the longest in it, G query heads of a key-value head, D head
size, T tokens, K experts of a token, E experts, H hidden size, I size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

GROUP_TOKENS = 65536
"""Keys of one call, padding included: copies of keys and values stay below a hundred MB or so."""


@dataclass(frozen=True)
class LengthGroup:
    """Sequences that attend together. rows int64 [n], None for all in order; slots int32 [n * L] of the key-value
    cache, where padding repeats the sequence's first; mask [n, 1, 1, L] to be added, None without padding."""

    rows: torch.Tensor | None
    slots: torch.Tensor
    mask: torch.Tensor | None


def length_groups(seq_lens: list[int], slots_BC: torch.Tensor, dtype: torch.dtype) -> list[LengthGroup]:
    """Each sequence in one group, in which it is longer than half of the longest, so that less than half is padding.

    slots_BC: of the cache, int32 [B, longest or more].
    """
    order = sorted(range(len(seq_lens)), key=seq_lens.__getitem__, reverse=True)
    groups, begin = [], 0
    while begin < len(order):
        longest = seq_lens[order[begin]]
        end = begin + 1
        while (end < len(order) and 2 * seq_lens[order[end]] > longest
               and (end + 1 - begin) * longest <= GROUP_TOKENS):
            end += 1
        rows = None if end - begin == len(order) else torch.tensor(order[begin:end])
        lengths_n1 = torch.tensor(seq_lens if rows is None else [seq_lens[row] for row in order[begin:end]])[:, None]
        slots_nL = (slots_BC if rows is None else slots_BC.index_select(0, rows))[:, :longest]
        mask = None
        if seq_lens[order[end - 1]] < longest:
            padding_nL = torch.arange(longest) >= lengths_n1
            slots_nL = torch.where(padding_nL, slots_nL[:, :1], slots_nL)
            mask = torch.zeros(padding_nL.shape, dtype=dtype).masked_fill_(padding_nL, -torch.inf)[:, None, None]
        groups.append(LengthGroup(rows, slots_nL.reshape(-1), mask))
        begin = end
    return groups


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: LengthGroup,
           scaling: float | None) -> torch.Tensor:
    """One token of each sequence of the group, [n, heads, D] as query; keys and values [slots, heads / G, D]."""
    n, heads, _ = query.shape

    def rows(cache: torch.Tensor) -> torch.Tensor:
        return cache.index_select(0, group.slots).view(n, -1, *cache.shape[1:]).transpose(1, 2).to(query.dtype)

    # the G query heads that share a key-value head are as G tokens of one head
    query_nkGD = query.reshape(n, keys.shape[1], heads // keys.shape[1], -1)
    attended = functional.scaled_dot_product_attention(query_nkGD, rows(keys), rows(values), attn_mask=group.mask,
                                                       scale=scaling)
    return attended.reshape(n, heads, -1)


def forget_groups(_: None, backend: Any, *args: Any, **kwargs: Any) -> None:
    """After TorchNativeAttnBackend.init_forward_metadata: the next decode finds its groups anew."""
    backend.forward_metadata = None


def batched_decode(
    one_by_one: Callable[..., torch.Tensor], backend: Any, query: torch.Tensor, output: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor, encoder_lens: torch.Tensor | None = None, *, scaling: float | None = None,
    causal: bool = False, is_cross_attn: bool = False, sliding_window_size: int | None = None, **kwargs: Any,
) -> torch.Tensor:
    """Around TorchNativeAttnBackend._run_sdpa_forward_decode, which does encoders and sliding windows."""
    if encoder_lens is not None or sliding_window_size is not None:
        return one_by_one(backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
                          encoder_lens, scaling=scaling, causal=causal, is_cross_attn=is_cross_attn,
                          sliding_window_size=sliding_window_size, **kwargs)
    if backend.forward_metadata is None:  # the same for every layer
        lengths = seq_lens.tolist()
        slots = req_to_token[:, :max(lengths)].index_select(0, req_pool_indices)
        backend.forward_metadata = length_groups(lengths, slots, query.dtype)
    for group in backend.forward_metadata:
        if group.rows is None:
            return output.copy_(attend(query, k_cache, v_cache, group, scaling))
        output.index_copy_(0, group.rows, attend(query.index_select(0, group.rows), k_cache, v_cache, group, scaling))
    return output


def grouped_experts(one_by_one: Callable[..., torch.Tensor], layer: torch.nn.Module, x: torch.Tensor,
                    topk_output: Any, moe_runner_config: Any) -> torch.Tensor:
    """Around moe_forward_native, which does experts that are not plain SwiGLU. x [T, H] -> [T, H]."""
    weights_TK, experts_TK, _ = topk_output
    w13, w2 = layer.w13_weight, layer.w2_weight  # [E, 2I, H], [E, H, I]
    plain = (moe_runner_config.activation == "silu" and moe_runner_config.gemm1_alpha is None
             and not moe_runner_config.apply_router_weight_on_input
             and getattr(layer, "w13_weight_bias", None) is None and getattr(layer, "w2_weight_bias", None) is None)
    aligned = all(size * x.element_size() % 16 == 0 for size in (w13.shape[2], w2.shape[2]))  # grouped_mm asks for it
    if not (plain and aligned):
        return one_by_one(layer, x, topk_output, moe_runner_config)
    experts, order = experts_TK.reshape(-1).sort()
    ends_E = torch.bincount(experts, minlength=layer.num_experts).cumsum(0).to(torch.int32)
    sorted_x = x.index_select(0, order // experts_TK.shape[1])
    gate, up = functional.grouped_mm(sorted_x, w13.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    sorted_y = functional.grouped_mm(functional.silu(gate) * up, w2.transpose(1, 2), offs=ends_E)
    y = torch.empty_like(sorted_y).index_copy_(0, order, sorted_y).view(*experts_TK.shape, -1)
    return torch.bmm(weights_TK[:, None].to(y.dtype), y)[:, 0]
