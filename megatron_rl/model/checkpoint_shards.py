"""The tensors of a checkpoint: flat fp32 ranges of parameters, a safetensors file for each rank, read by range.

A parameter is known by KEY and PIECE (checkpoint.py). `parameters` of the manifest says where its elements are:
{KEY: {"shape": of one piece, "pieces": [[[rank, start, end], ...] for each piece]}}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_rl.model.checkpoint_files import Writer


@dataclass(frozen=True)
class Held:
    """Elements [start, end) of one flattened piece, in the file of the rank that describes them so."""

    key: str
    piece: int
    shape: tuple[int, ...]
    start: int
    end: int


def tensor_name(kind: str, key: str, piece: int) -> str:
    return f"{kind}/{key}/{piece}"


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def locate(held: Sequence[Sequence[Held]]) -> dict[str, dict[str, Any]]:
    """`parameters` of the manifest from what each rank holds, in rank order.

    Every element is held at least once; both copies of a tied embedding, on two pipeline stages, are equal.
    """
    found: dict[str, dict[str, Any]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            about = found.setdefault(part.key, {"shape": list(part.shape), "pieces": []})
            about["pieces"] += [[] for _ in range(part.piece + 1 - len(about["pieces"]))]
            about["pieces"][part.piece].append([rank, part.start, part.end])
    for key, about in found.items():
        for ranges in about["pieces"]:
            covered = 0
            for _, start, end in sorted(ranges, key=lambda each: each[1]):
                assert start <= covered, f"{key}: nobody holds elements {covered} to {start}"
                covered = max(covered, end)
            assert covered == prod(about["shape"]), f"{key}: {covered} elements of {about['shape']} are held"
    return found


def write_tensors(file: Writer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Flat fp32 tensors (any device) in the safetensors format, one at a time in host memory."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.dim() == 1, (name, tensor.dtype, tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(memoryview(tensor.cpu().contiguous().numpy()).cast("B"))


class ShardReader:
    """Ranges of pieces from the files of all ranks, opened when first needed."""

    def __init__(self, checkpoint: Path, parameters: Mapping[str, Any]):
        self._checkpoint, self._parameters = checkpoint, parameters
        self._handles: dict[int, Any] = {}

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one piece of `key` as it was saved."""
        return tuple(self._parameters[key]["shape"])

    def num_pieces(self, key: str) -> int:
        return len(self._parameters[key]["pieces"])

    def read(self, kind: str, key: str, piece: int, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of the flattened piece, fp32 on the CPU."""
        out = torch.empty(end - start)
        for rank, first, last in self._parameters[key]["pieces"][piece]:
            low, high = max(start, first), min(end, last)
            if low < high:
                saved = self._file(rank).get_slice(tensor_name(kind, key, piece))
                out[low - start:high - start] = saved[low - first:high - first]
        return out

    def read_piece(self, kind: str, key: str, piece: int) -> torch.Tensor:
        shape = self.shape(key)
        return self.read(kind, key, piece, 0, prod(shape)).view(shape)

    def _file(self, rank: int):
        if rank not in self._handles:
            self._handles[rank] = safe_open(str(self._checkpoint / file_name(rank)), framework="pt")
        return self._handles[rank]
