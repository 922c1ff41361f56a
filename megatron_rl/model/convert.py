"""Hugging Face names <-> Megatron's sharded parameters, streaming in both directions.

What a parameter is made of says its Slot (slots.py). `load_hf` reads the tensors of one slot at a time. `Exporter`
sends each piece once to rank 0, many in one message; rank 0 holds two rounds of messages at most. Copies only: a round
trip is equal bit for bit.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.model.adapters import matrix_slots
from megatron_rl.model.build import Policy
from megatron_rl.model.hf_folder import HFReader, check_checkpoint
from megatron_rl.model.slots import Slot, network_slots
from megatron_rl.topology import Topology

_LOCAL_EXPERT = re.compile(r"(?<=local_experts\.)\d+")
_TRANSFORMER_ENGINE = (
    (re.compile(r"^self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"^mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (re.compile(r"^mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r"mlp.experts.local_experts.\2.\1.weight"),
)
"""Names of a layer's parameters in te_spec.py, and what they are in spec.py's other layers and in slots.py."""
_LAYERS = "decoder.layers."
GATHER_BYTES = 64 << 20
"""How much of the weights rank 0 gathers at a time. A piece alone is small: 5.8 MB for an expert of Ling-lite."""
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


Slots = list[tuple[Slot, torch.nn.Parameter]]


def slots(policy: Policy, topology: Topology) -> Slots:
    """(Slot, parameter) of every parameter of the network on this rank, without adapters. The last stage's copy of a
    tied embedding is one of them."""
    return [pair for name, pair in _all_slots(policy, topology) if not _is_adapter(name)]


def trained_slots(policy: Policy, topology: Topology) -> Slots:
    """(Slot, parameter) of what trains: the matrices of adapters if there are any, and else all parameters."""
    if policy.adapters is None:
        return slots(policy, topology)
    return [pair for name, pair in _all_slots(policy, topology) if _is_adapter(name)]


def _is_adapter(name: str) -> bool:
    return ".lora." in name


def _all_slots(policy: Policy, topology: Topology) -> list[tuple[str, tuple[Slot, torch.nn.Parameter]]]:
    """With each parameter's Megatron name, layers and experts by their global numbers."""
    known = network_slots(policy.config, mtp=policy.mtp is not None)
    if policy.adapters is not None:
        known = known | matrix_slots(policy.config, policy.lora)
    first_expert = topology.ep_rank * (policy.config.num_experts // topology.ep_size)
    found = []
    for gpt in policy.gpt_models:
        for name, parameter in gpt.named_parameters():
            if name.startswith(_LAYERS):
                name = _LOCAL_EXPERT.sub(lambda match: str(int(match[0]) + first_expert), _global_name(gpt, name))
            elif name == _HEAD and policy.config.tie_word_embeddings:
                name = _EMBEDDING
            found.append((name, (known[name], parameter)))
    for name, parameter in policy.mtp.named_parameters(prefix="mtp") if policy.mtp is not None else ():
        name = _LOCAL_EXPERT.sub(lambda match: str(int(match[0]) + first_expert), name)
        found.append((name, (known[name], parameter)))
    return found


def frozen_slots(policy: Policy) -> list[tuple[Slot, torch.Tensor]]:
    """(Slot, buffer) of every buffer on this rank that a checkpoint holds: the experts' biases."""
    known = network_slots(policy.config, mtp=policy.mtp is not None)
    named = [(_global_name(gpt, name), buffer) for gpt in policy.gpt_models for name, buffer in gpt.named_buffers()
             if name.startswith(_LAYERS)]
    named += policy.mtp.named_buffers(prefix="mtp") if policy.mtp is not None else []
    return [(known[name], buffer) for name, buffer in named if name in known]


def _global_name(gpt, name: str) -> str:
    """`decoder.layers.N...` with N counted over the whole network, and the rest as slots.py has it."""
    _, _, local, rest = name.split(".", 3)
    for theirs, ours in _TRANSFORMER_ENGINE:
        rest = theirs.sub(ours, rest)
    return f"{_LAYERS}{gpt.decoder.layers[int(local)].layer_number - 1}.{rest}"


@torch.no_grad()
def load_hf(policy: Policy, topology: Topology, folder: str | Path) -> None:
    """Fill this rank's parameters and buffers from the Hugging Face folder.

    ValueError if it does not match its config.json.
    """
    reader = HFReader(folder)
    check_checkpoint(policy.config, reader, mtp=policy.mtp is not None)
    for slot, parameter in [*slots(policy, topology), *frozen_slots(policy)]:
        _fill(slot, parameter, [reader.get(name) for name in slot.names], topology)


@torch.no_grad()
def fill_adapters(policy: Policy, topology: Topology, whole: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    """Fill this rank's part of every adapter. whole(name, shape): a whole matrix by its name."""
    for slot, parameter in trained_slots(policy, topology) if policy.adapters else ():
        _fill(slot, parameter, [whole(name, shape) for name, shape in slot.shapes.items()], topology)


def _fill(slot: Slot, parameter: torch.Tensor, whole: list[torch.Tensor], topology: Topology) -> None:
    """This rank's piece of `whole`, the tensors that the Slot names."""
    over_tp = slot.over == "tp"
    rank = topology.tp_rank if over_tp else topology.etp_rank
    size = topology.tp_size if over_tp else topology.etp_size
    piece = slot.shard(whole, rank, size)
    assert piece.shape == parameter.shape, (slot, piece.shape, parameter.shape)
    parameter.data.copy_(piece)


@dataclass(frozen=True)
class Gathered:
    """A slot whose pieces are brought together on rank 0. shape, dtype: of each piece; sources: the rank of each."""

    slot: Slot
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: list[int]

    @property
    def num_bytes(self) -> int:
        return len(self.sources) * math.prod(self.shape) * self.dtype.itemsize


def _rounds(plan: Iterable[Gathered]) -> list[list[Gathered]]:
    """Consecutive slots of one dtype, of at most GATHER_BYTES together; a larger slot is alone."""
    rounds: list[list[Gathered]] = []
    held = 0
    for each in plan:
        if not rounds or each.dtype != rounds[-1][0].dtype or held + each.num_bytes > GATHER_BYTES:
            rounds.append([])
            held = 0
        rounds[-1].append(each)
        held += each.num_bytes
    return rounds


class Exporter:
    """Streams the policy's current weights to rank 0 as (Hugging Face name, tensor on the CPU or device).

    Adapters are merged into the weights beside which they stand. adapters True: their matrices themselves, alone.
    """

    def __init__(self, policy: Policy, topology: Topology, *, adapters: bool = False):
        self._topology = topology
        self._adapters = None if adapters else policy.adapters
        chosen = trained_slots(policy, topology) if adapters else [*slots(policy, topology), *frozen_slots(policy)]
        self._local = {slot.key: (slot, tensor) for slot, tensor in chosen}
        self._rounds = _rounds(self._gather_plan())

    def _piece(self, key: str) -> torch.Tensor:
        tensor = self._local[key][1]
        return tensor.detach() if self._adapters is None else self._adapters.merged(tensor)

    def _gather_plan(self) -> list[Gathered]:
        """In one order that all ranks share."""
        here = self._topology
        owned = []
        for key, (slot, parameter) in self._local.items():
            over_tp = slot.over == "tp"
            owns = (here.dp_rank == 0 and here.cp_rank == 0) if over_tp else here.expert_dp_rank == 0
            rank = here.tp_rank if over_tp else here.etp_rank
            if owns and not (slot.cut == "none" and rank > 0):
                index = 0 if slot.cut == "none" else rank
                owned.append((key, slot, tuple(parameter.shape), parameter.dtype, index))
        sources: dict[str, dict[int, int]] = {}
        about: dict[str, tuple] = {}
        for rank, items in enumerate(here.gather_objects(owned)):
            for key, slot, shape, dtype, index in items:
                about[key] = (slot, shape, dtype)
                sources.setdefault(key, {})[index] = rank
        return [Gathered(*about[key], [sources[key][i] for i in sorted(sources[key])]) for key in sorted(about)]

    @torch.no_grad()
    def __call__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Named tensors on rank 0; other ranks must iterate too (they send, and yield nothing)."""
        if self._topology.rank == 0:
            yield from self._receive()
        else:
            self._send()

    def _receive(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The next round arrives while the caller works on this one."""
        coming = self._expect(self._rounds[0])
        for round_, following in zip(self._rounds, [*self._rounds[1:], []], strict=True):
            for _, work in coming.values():
                work.wait()
            left = {source: buffer for source, (buffer, _) in coming.items()}
            coming = self._expect(following)
            for each in round_:
                pieces, size = [], math.prod(each.shape)
                for source in each.sources:
                    if source == 0:
                        pieces.append(self._piece(each.slot.key))
                    else:
                        pieces.append(left[source][:size].view(each.shape))
                        left[source] = left[source][size:]
                yield from each.slot.unshard(pieces)

    def _expect(self, round_: list[Gathered]) -> dict[int, tuple[torch.Tensor, dist.Work]]:
        """By rank: the buffer for its pieces of a round, and what is done when they are there."""
        sizes: Counter[int] = Counter()
        for each in round_:
            sizes.update(dict.fromkeys(each.sources, math.prod(each.shape)))
        coming = {}
        for source in sizes.keys() - {0}:
            buffer = torch.empty(sizes[source], dtype=round_[0].dtype, device=self._topology.device)
            coming[source] = buffer, dist.irecv(buffer, src=source)
        return coming

    def _send(self) -> None:
        """This rank's pieces, a message for each round in which it has some."""
        rank = self._topology.rank
        for round_ in self._rounds:
            pieces = [self._piece(each.slot.key).flatten() for each in round_ if rank in each.sources]
            if pieces:
                dist.send(torch.cat(pieces), dst=0)
