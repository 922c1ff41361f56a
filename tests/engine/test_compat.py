"""The hash that SGLang's seeded sampling needs, against MurmurHash3 written from its definition."""

from __future__ import annotations

import torch

from megatron_rl.compat.sglang_cpu import murmur_hash32

WORD = 0xFFFFFFFF


def murmur3_32(words: list[int]) -> int:
    def rotate(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (32 - bits))) & WORD

    state = 0
    for word in words:
        word = rotate(word * 0xCC9E2D51 & WORD, 15) * 0x1B873593 & WORD
        state = (rotate(state ^ word, 13) * 5 + 0xE6546B64) & WORD
    state ^= 4 * len(words)
    state = (state ^ (state >> 16)) * 0x85EBCA6B & WORD
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & WORD
    return state ^ (state >> 16)


def test_reference_agrees_with_a_published_vector():
    """MurmurHash3_x86_32 of the 4 bytes "test" with seed 0."""
    assert murmur3_32([int.from_bytes(b"test", "little")]) == 0xBA6BD213


def test_torch_hash_is_murmur3_of_seed_position_and_column():
    seeds = [0, 1, 2**32 + 5, 2**63 - 1]
    positions = [0, 7, 511, 2**31]
    got = murmur_hash32(torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.arange(6))
    expected = [
        [murmur3_32([seed & WORD, seed >> 32, position, column]) for column in range(6)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert got.dtype == torch.uint32
    assert got.to(torch.int64).tolist() == expected
