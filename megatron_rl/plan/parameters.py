"""Elements of every parameter that one rank holds, by pipeline stage, from the slots that the converters use."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from math import prod

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.model.network import Network
from megatron_rl.model.slots import network_slots

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(?:.*\.local_experts\.(\d+)\.)?")
EMBEDDING, FINAL_NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
HEAD = "output_layer.weight"


@dataclass(frozen=True)
class Chunk:
    """One model chunk of a rank (a pipeline stage has parallel.vpp of them): elements of each of its tensors.

    layers: global numbers, from 0. dense: everything but routed experts.
    """

    layers: range
    first: bool
    last: bool
    dense: tuple[int, ...]
    experts: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return sum(self.dense) + sum(self.experts)


def stage_chunks(model: Network, parallel: ParallelConfig, stage: int) -> list[Chunk]:
    """The chunks of pipeline stage `stage`; stage s of p holds virtual stages s, s + p, s + 2p, ..."""
    virtual = parallel.pp * (parallel.vpp or 1)
    per_chunk = model.num_hidden_layers // virtual
    tensors = _tensors(model, parallel.tp, parallel.ep, parallel.etp)
    chunks = []
    for index in range(stage, virtual, parallel.pp):
        layers, first, last = range(index * per_chunk, (index + 1) * per_chunk), index == 0, index == virtual - 1
        names = [*layers, *([EMBEDDING] if first else []), *([FINAL_NORM] if last else []),
                 *([HEAD] if last and HEAD in tensors else [])]
        if last and not first and model.tie_word_embeddings:
            names.append(EMBEDDING)  # the last stage's own copy
        dense = tuple(size for name in names for size in tensors[name][0])
        chunks.append(Chunk(layers, first, last, dense, tuple(size for name in names for size in tensors[name][1])))
    return chunks


@functools.cache
def _tensors(model: Network, tp: int, ep: int, etp: int) -> dict[int | str, tuple[list[int], list[int]]]:
    """Layer number, or name outside the layers -> elements on one rank of its (dense tensors, expert tensors)."""
    found: dict[int | str, tuple[list[int], list[int]]] = {}
    for name, slot in network_slots(model).items():
        if slot.frozen_dtype is not None:
            continue  # a buffer
        size = sum(prod(part) for part in slot.parts)
        if slot.cut != "none":
            size //= tp if slot.over == "tp" else etp
        where = _LAYER.match(name)
        expert = None if where is None else where.group(2)
        if expert is not None and int(expert) >= model.num_experts // ep:
            continue  # every rank has as many
        found.setdefault(name if where is None else int(where.group(1)), ([], []))[expert is not None].append(size)
    return found
