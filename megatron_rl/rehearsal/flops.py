"""FLOPs of one operation: torch's own formulas, and attention by the pairs that a causal mask leaves."""

from __future__ import annotations

import torch
from torch.nn.attention import varlen
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
FLASH, FLASH_BACKWARD = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward
CPU_FLASH = aten._scaled_dot_product_flash_attention_for_cpu
CPU_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
ADD_PRODUCT, PRODUCT = "megatron_rl.add_product", "megatron_rl.product"
"""The stand-ins for torch.addmm and torch.mm with out_dtype (standins.py)."""
VARLEN, VARLEN_BACKWARD = torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward
assert varlen.varlen_attn  # its module registers the two
LENGTHS = WeakIdKeyDictionary()
"""Offsets of packed sequences, on the device -> their lengths. torch's own formula reads the offsets."""


def operation_flops(func, args, kwargs, out) -> int:
    """0 for what is no matrix product."""
    packet = func._overloadpacket
    if packet is FLASH:
        return _causal(flop_registry[packet](*args, **kwargs, out_val=out), args[0], args[1],
                       len(args) > 4 and args[4])
    if packet is FLASH_BACKWARD:
        return _causal(flop_registry[packet](*args, **kwargs, out_val=out), args[1], args[2], args[11])
    if packet is CPU_FLASH:
        shapes = [tensor.shape for tensor in args[:3]]
        return _causal(sdpa_flop_count(*shapes), args[0], args[1], len(args) > 4 and args[4])
    if packet is CPU_FLASH_BACKWARD:
        shapes = [tensor.shape for tensor in args[:4]]
        return _causal(sdpa_backward_flop_count(*shapes), args[1], args[2], args[7])
    if packet is VARLEN:
        return _varlen(sdpa_flop_count, *args[:2], *args[3:5])
    if packet is VARLEN_BACKWARD:
        return _varlen(lambda query, *shapes: sdpa_backward_flop_count(query, query, *shapes), *args[1:3], *args[6:8])
    if packet is aten._grouped_mm:  # rows of groups times a matrix each, or a matrix of each group
        return 2 * args[0].numel() * args[1].shape[-1]
    if packet is aten.addmm_ or str(packet) == ADD_PRODUCT:  # torch counts addmm, not its form in place
        (rows, inner), columns = args[1].shape, args[2].shape[1]
        return 2 * rows * inner * columns
    if str(packet) == PRODUCT:
        return 2 * args[0].numel() * args[1].shape[1]
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


def _causal(flops: int, query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> int:
    """The share of flops that falls on pairs of a query and a key that it sees; queries are the last positions."""
    if not is_causal:
        return flops
    return _seen(flops, query.shape[2], key.shape[2])


def _varlen(count, query, key, query_offsets, key_offsets) -> int:
    """count: FLOPs of [1, H, L, D] queries, keys and values."""
    shapes = [[(1, tensor.shape[1], length, tensor.shape[2]) for length in LENGTHS[offsets]]
              for tensor, offsets in ((query, query_offsets), (key, key_offsets))]
    return sum(_seen(count(q, k, k), q[2], k[2]) for q, k in zip(*shapes, strict=True))


def _seen(flops: int, queries: int, keys: int) -> int:
    pairs = queries * (keys - queries) + queries * (queries + 1) // 2
    return flops * pairs // (queries * keys)
