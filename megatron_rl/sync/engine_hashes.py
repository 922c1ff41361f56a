"""SGLang 0.5.23's two hashes of a parameter's bytes, fed piece by piece.

On a CPU: the first 8 bytes of SHA-256 (sglang/srt/managers/mm_utils.py: tensor_hash). On a GPU: sums of mixed words
(sglang/kernels/ops/memory/gpu_tensor_hash.py), which are taken here by torch, on whatever device the pieces are.
"""

from __future__ import annotations

import hashlib

import torch

TILE, AT_ONCE = 8192, 2**22
"""Words of 32 bits: of a tile of the GPU's hash, and those that are mixed at a time (a multiple)."""
SEED = 0x243F6A88
SEEDS = (SEED, ((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
PLACES, TURNS = (0x27D4EB2D, 0x165667B1), (15, 13)
MASK32, MASK64 = 2**32 - 1, 2**64 - 1


class CPUHash:
    """tensor_hash of a tensor on a CPU."""

    def __init__(self):
        self._sha = hashlib.sha256()

    def update(self, part: torch.Tensor) -> None:
        self._sha.update(memoryview(_bytes(part).cpu().numpy()))

    def hexdigest(self) -> str:
        """16 digits."""
        return self._sha.digest()[:8].hex()


class GPUHash:
    """gpu_tensor_hash: tile by tile two sums, each mixed with the number of bytes, added up and mixed again."""

    def __init__(self):
        self._words, self._tail = 0, torch.empty(0, dtype=torch.uint8)
        self._sums: tuple[list[int], list[int]] = ([], [])

    def update(self, part: torch.Tensor) -> None:
        data = torch.cat([self._tail.to(part.device), _bytes(part)])
        whole = len(data) // 4 * 4
        self._tail = data[whole:]
        words = data[:whole].clone().view(torch.int32)
        for chunk in words.split(AT_ONCE):
            self._add(chunk)

    def hexdigest(self) -> str:
        """16 digits."""
        if len(self._tail):
            self.update(self._tail.new_zeros(4 - len(self._tail)))
        if self._words == 0:
            return f"{0:016x}"
        high, low = (sum((_mix(torch.tensor(sums) ^ (self._words * 4 & MASK32)) & MASK32).tolist())
                     for sums in self._sums)
        return f"{_splitmix((high << 32) + low):016x}"

    def _add(self, words: torch.Tensor) -> None:
        places = torch.arange(self._words, self._words + len(words), device=words.device) & MASK32
        before = self._words % TILE
        after = -(before + len(words)) % TILE
        for sums, seed, factor, turn in zip(self._sums, SEEDS, PLACES, TURNS, strict=True):
            mixed = _mix((words.long() & MASK32) ^ ((places * factor + seed) & MASK32) ^ _turned(places, turn))
            by_tile = torch.nn.functional.pad(mixed, (before, after)).view(-1, TILE).sum(1).tolist()
            if before:
                sums[-1] = (sums[-1] + by_tile.pop(0)) & MASK32
            sums.extend(each & MASK32 for each in by_tile)
        self._words += len(words)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's fmix32 of int64 numbers below 2**32. A product's upper half may overflow: it is cut off."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = ((words ^ (words >> shift)) * factor) & MASK32
    return words ^ (words >> 16)


def _turned(words: torch.Tensor, bits: int) -> torch.Tensor:
    return ((words << bits) | (words >> (32 - bits))) & MASK32


def _splitmix(number: int) -> int:
    number &= MASK64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        number = ((number ^ (number >> shift)) * factor) & MASK64
    return number ^ (number >> 31)
