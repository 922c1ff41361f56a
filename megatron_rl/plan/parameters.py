"""Elements of every parameter that one rank holds, by pipeline stage, from the slots that the converters use."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.model.adapters import matrix_slots
from megatron_rl.model.network import Network
from megatron_rl.model.slots import network_slots

_LAYER = re.compile(r"^(?:decoder\.layers\.(\d+)|(mtp))\.(?:.*\.local_experts\.(\d+)\.)?")
EMBEDDING, FINAL_NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
HEAD = "output_layer.weight"


@dataclass(frozen=True)
class Chunk:
    """One model chunk of a rank (a pipeline stage has parallel.vpp of them): elements of each of its tensors.

    layers: global numbers, from 0. dense: everything that trains but routed experts; experts: these. frozen: elements
    of (dense, expert) tensors that do not train, which are the network's own with model.lora.
    """

    layers: range
    first: bool
    last: bool
    dense: tuple[int, ...]
    experts: tuple[int, ...]
    frozen: tuple[int, int] = (0, 0)

    @property
    def num_parameters(self) -> int:
        return sum(self.dense) + sum(self.experts) + sum(self.frozen)


def stage_chunks(model: Network, parallel: ParallelConfig, stage: int, lora: LoraConfig | None = None) -> list[Chunk]:
    """The chunks of pipeline stage `stage`; stage s of p holds virtual stages s, s + p, s + 2p, ..."""
    virtual = parallel.pp * (parallel.vpp or 1)
    per_chunk = model.num_hidden_layers // virtual
    tensors = _tensors(model, None, parallel.tp, parallel.ep, parallel.etp)
    adapters = None if lora is None or not lora.on else _tensors(model, lora, parallel.tp, parallel.ep, parallel.etp)
    chunks = []
    for index in range(stage, virtual, parallel.pp):
        layers, first, last = range(index * per_chunk, (index + 1) * per_chunk), index == 0, index == virtual - 1
        names = [*layers, *([EMBEDDING] if first else []), *([FINAL_NORM] if last else []),
                 *([HEAD] if last and HEAD in tensors else [])]
        if last and not first and model.tie_word_embeddings:
            names.append(EMBEDDING)  # the last stage's own copy
        dense, experts = _of(names, tensors)
        if adapters is None:
            chunks.append(Chunk(layers, first, last, dense, experts))
        else:
            chunks.append(Chunk(layers, first, last, *_of(layers, adapters), frozen=(sum(dense), sum(experts))))
    return chunks


def mtp_chunk(model: Network, parallel: ParallelConfig) -> Chunk:
    """The layer behind the last with model.mtp, which has gradient buffers and an optimiser of its own."""
    behind = model.num_hidden_layers
    tensors = _tensors(model, None, parallel.tp, parallel.ep, parallel.etp, mtp=True)
    return Chunk(range(behind, behind + 1), False, False, *_of(["mtp"], tensors))


Tensors = dict[int | str, tuple[list[int], list[int]]]
"""Layer number, or name outside the layers -> elements on one rank of its (dense tensors, expert tensors)."""


def _of(names: Iterable[int | str], tensors: Tensors) -> tuple[tuple[int, ...], tuple[int, ...]]:
    dense, experts = (tuple(size for name in names for size in tensors[name][kind]) for kind in (0, 1))
    return dense, experts


@functools.cache
def _tensors(model: Network, lora: LoraConfig | None, tp: int, ep: int, etp: int, mtp: bool = False) -> Tensors:
    """Those of the network, or of its adapters. The layer behind the last is called mtp."""
    found: Tensors = {}
    for name, slot in (network_slots(model, mtp=mtp) if lora is None else matrix_slots(model, lora)).items():
        if slot.frozen_dtype is not None:
            continue  # a buffer
        size = sum(prod(part) for part in slot.parts)
        if slot.cut != "none":
            size //= tp if slot.over == "tp" else etp
        where = _LAYER.match(name)
        expert = None if where is None else where.group(3)
        if expert is not None and int(expert) >= model.num_experts // ep:
            continue  # every rank has as many
        key = name if where is None else where.group(2) or int(where.group(1))
        found.setdefault(key, ([], []))[expert is not None].append(size)
    return found
