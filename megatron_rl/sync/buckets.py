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


JOINED = (".self_attn.q_a_proj.weight", ".self_attn.kv_a_proj_with_mqa.weight")
"""SGLang makes one parameter of these two tensors of a layer, and forgets one that comes in a bucket without the other
(models/deepseek_common/deepseek_weight_loader.py: do_load_weights)."""


def make_buckets(named_tensors: Iterable[NamedTensor], bucket_bytes: int) -> Iterator[Bucket]:
    """Buckets of at most bucket_bytes, in order. A larger tensor travels alone. JOINED tensors lie together.

    A tensor opens a new bucket if its dtype does not divide the address at which it would start.
    """
    held: list[NamedTensor] = []
    held_bytes = 0
    index = 0
    for unit in _units(named_tensors):
        unit_bytes = sum(tensor.nbytes for _, tensor in unit)
        unaligned = held_bytes % unit[0][1].element_size() != 0
        if held and (unaligned or held_bytes + unit_bytes > bucket_bytes):
            yield Bucket(index, tuple(held), last=False)
            index, held, held_bytes = index + 1, [], 0
        held += unit
        held_bytes += unit_bytes
    if not held:
        raise ValueError("nothing to publish: the export gave no tensors")
    yield Bucket(index, tuple(held), last=True)


def _units(named_tensors: Iterable[NamedTensor]) -> Iterator[list[NamedTensor]]:
    """Tensors that must share a bucket. One of JOINED waits for the other of its layer, if there is one."""
    waiting: list[NamedTensor] = []
    for name, tensor in named_tensors:
        if not name.endswith(JOINED):
            yield [(name, tensor)]
        elif waiting and waiting[0][0].partition(".self_attn.")[0] == name.partition(".self_attn.")[0]:
            yield [*waiting, (name, tensor)]
            waiting = []
        else:
            if waiting:
                yield waiting
            waiting = [(name, tensor)]
    if waiting:
        yield waiting


def bucket_metadata(bucket: Bucket) -> list[SimpleNamespace]:
    """Name, shape, dtype and place of each tensor in Bucket.flatten(), in the order and names of SGLang's metadata."""
    metadata, offset = [], 0
    for name, tensor in bucket.tensors:
        metadata.append(SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=offset,
                                        end_idx=offset + tensor.nbytes, numel=tensor.nbytes))
        offset += tensor.nbytes
    return metadata
