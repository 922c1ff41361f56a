"""Flat buckets of bounded size, in which tensors travel to the engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch

NamedTensor = tuple[str, torch.Tensor]
# SGLang's FlattenedTensorBucket on the wire (sglang/srt/weight_sync/tensor_bucket.py). Importing it takes
# 7 s, and its unpickler accepts plain namespaces.
FLATTENED_BUCKET = "flattened_bucket"


@dataclass(frozen=True)
class Bucket:
    """Some consecutive tensors of the model. `last` marks the end of the model."""

    index: int
    tensors: tuple[NamedTensor, ...]
    last: bool

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors)

    def flatten(self, into: torch.Tensor) -> torch.Tensor:
        """All tensors end to end in the first num_bytes of `into` (uint8, any device), which it returns."""
        start = 0
        for _, tensor in self.tensors:
            into[start : start + tensor.nbytes].copy_(tensor.detach().contiguous().flatten().view(torch.uint8))
            start += tensor.nbytes
        return into[:start]

    def describe(self) -> str:
        return (f"bucket {self.index} ({self.tensors[0][0]} ... {self.tensors[-1][0]}, "
                f"{len(self.tensors)} tensors, {self.num_bytes} bytes)")


def make_buckets(named_tensors: Iterable[NamedTensor], bucket_bytes: int) -> Iterator[Bucket]:
    """Buckets of at most bucket_bytes, in order. A larger tensor travels alone.

    A tensor opens a new bucket if its dtype does not divide the address at which it would start.
    """
    held: list[NamedTensor] = []
    held_bytes = 0
    index = 0
    for name, tensor in named_tensors:
        unaligned = held_bytes % tensor.element_size() != 0
        if held and (unaligned or held_bytes + tensor.nbytes > bucket_bytes):
            yield Bucket(index, tuple(held), last=False)
            index, held, held_bytes = index + 1, [], 0
        held.append((name, tensor))
        held_bytes += tensor.nbytes
    if not held:
        raise ValueError("nothing to publish: the export gave no tensors")
    yield Bucket(index, tuple(held), last=True)


def bucket_metadata(bucket: Bucket) -> list[SimpleNamespace]:
    """Name, shape, dtype and place of each tensor in Bucket.flatten(), in the order and names of SGLang's metadata."""
    metadata, offset = [], 0
    for name, tensor in bucket.tensors:
        metadata.append(SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=offset,
                                        end_idx=offset + tensor.nbytes, numel=tensor.nbytes))
        offset += tensor.nbytes
    return metadata
