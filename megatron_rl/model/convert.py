"""Hugging Face names <-> Megatron's sharded parameters, one declarative table, streaming in both directions.

A Slot says how one Megatron parameter is made of Hugging Face tensors: which ones, and how they are cut over
the tensor- or expert-tensor-parallel group. `load_hf` reads only this rank's pieces; `export_hf` sends each
piece once to rank 0, so memory is bounded by one tensor. Copies only: a round trip is equal bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.model.bailing import BailingConfig
from megatron_rl.model.build import Policy
from megatron_rl.model.hf_folder import HFReader, check_checkpoint
from megatron_rl.topology import Topology

_EXPERT = re.compile(r"^(mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")


@dataclass(frozen=True)
class Slot:
    """One Megatron parameter as Hugging Face tensors.

    names: one name, or (gate, up) stacked. cut: none | rows | columns | qkv | gate_up; over: tp | etp.
    """

    names: tuple[str, ...]
    cut: str
    over: str = "tp"

    @property
    def key(self) -> str:
        return self.names[0]


_TOP = {
    "embedding.word_embeddings.weight": Slot(("model.word_embeddings.weight",), "rows"),
    "decoder.final_layernorm.weight": Slot(("model.norm.weight",), "none"),
    "output_layer.weight": Slot(("lm_head.weight",), "rows"),
}
_LAYER = {
    "input_layernorm.weight": (("input_layernorm",), "none"),
    "self_attention.linear_qkv.weight": (("attention.query_key_value",), "qkv"),
    "self_attention.linear_proj.weight": (("attention.dense",), "columns"),
    "pre_mlp_layernorm.weight": (("post_attention_layernorm",), "none"),
    "mlp.router.weight": (("mlp.gate",), "none"),
    "mlp.shared_experts.linear_fc1.weight": (("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"), "gate_up"),
    "mlp.shared_experts.linear_fc2.weight": (("mlp.shared_experts.down_proj",), "columns"),
    "mlp.linear_fc1.weight": (("mlp.gate_proj", "mlp.up_proj"), "gate_up"),
    "mlp.linear_fc2.weight": (("mlp.down_proj",), "columns"),
}


def _layer_slot(layer: int, rest: str, first_expert: int) -> Slot:
    prefix = f"model.layers.{layer}."
    expert = _EXPERT.match(rest)
    if expert:
        where = f"{prefix}mlp.experts.{int(expert.group(2)) + first_expert}"
        if expert.group(3) == "linear_fc1":
            return Slot((f"{where}.gate_proj.weight", f"{where}.up_proj.weight"), "gate_up", "etp")
        return Slot((f"{where}.down_proj.weight",), "columns", "etp")
    names, cut = _LAYER[rest]
    return Slot(tuple(f"{prefix}{name}.weight" for name in names), cut)


def slots(policy: Policy, topology: Topology) -> list[tuple[Slot, torch.nn.Parameter]]:
    """(Slot, parameter) of every parameter on this rank."""
    first_expert = topology.ep_rank * (policy.config.num_experts // topology.ep_size)
    found = []
    for gpt in policy.gpt_models:
        for name, parameter in gpt.named_parameters():
            if name in _TOP:
                found.append((_TOP[name], parameter))
                continue
            _, _, local, rest = name.split(".", 3)  # decoder.layers.<local>.<rest>
            layer = gpt.decoder.layers[int(local)].layer_number - 1
            found.append((_layer_slot(layer, rest, first_expert), parameter))
    return found


def _qkv_to_groups(config: BailingConfig, fused: torch.Tensor) -> torch.Tensor:
    """[all Q][all K][all V] rows -> Megatron's [q..q k v] per key-value group, [G, per_group*D, hidden]."""
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = fused.split([heads * dim, kv * dim, kv * dim])
    hidden = fused.shape[-1]
    return torch.cat([q.view(kv, -1, hidden), k.view(kv, dim, hidden), v.view(kv, dim, hidden)], dim=1)


def _groups_to_qkv(config: BailingConfig, groups: torch.Tensor) -> torch.Tensor:
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden = groups.shape[-1]
    q, k, v = groups.view(kv, -1, hidden).split([heads // kv * dim, dim, dim], dim=1)
    return torch.cat([t.reshape(-1, hidden) for t in (q, k, v)])


def shard(slot: Slot, config: BailingConfig, tensors: list[torch.Tensor], rank: int, size: int) -> torch.Tensor:
    """This rank's piece of the Megatron parameter, from the whole Hugging Face tensors."""
    if slot.cut == "none":
        return tensors[0]
    if slot.cut == "rows":
        return tensors[0].chunk(size, 0)[rank]
    if slot.cut == "columns":
        return tensors[0].chunk(size, 1)[rank]
    if slot.cut == "qkv":
        return _qkv_to_groups(config, tensors[0]).chunk(size, 0)[rank].flatten(0, 1)
    return torch.cat([tensor.chunk(size, 0)[rank] for tensor in tensors])


def unshard(slot: Slot, config: BailingConfig, pieces: list[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The whole Hugging Face tensors, named, from the pieces of all ranks in order."""
    if slot.cut == "none":
        return [(slot.names[0], pieces[0])]
    if slot.cut in ("rows", "columns"):
        return [(slot.names[0], torch.cat(pieces, 0 if slot.cut == "rows" else 1))]
    if slot.cut == "qkv":
        return [(slot.names[0], _groups_to_qkv(config, torch.cat(pieces)))]
    halves = [piece.chunk(2, 0) for piece in pieces]
    return [(name, torch.cat([half[i] for half in halves])) for i, name in enumerate(slot.names)]


@torch.no_grad()
def load_hf(policy: Policy, topology: Topology, folder: str | Path) -> None:
    """Fill this rank's parameters from the Hugging Face folder; ValueError if it does not match its config.json."""
    reader = HFReader(folder)
    check_checkpoint(policy.config, reader)
    for slot, parameter in slots(policy, topology):
        over_tp = slot.over == "tp"
        rank = topology.tp_rank if over_tp else topology.etp_rank
        size = topology.tp_size if over_tp else topology.etp_size
        piece = shard(slot, policy.config, [reader.get(name) for name in slot.names], rank, size)
        assert piece.shape == parameter.shape, (slot, piece.shape, parameter.shape)
        parameter.data.copy_(piece)


class Exporter:
    """Streams the policy's current weights to rank 0 as (Hugging Face name, tensor on the CPU or device)."""

    def __init__(self, policy: Policy, topology: Topology):
        self._policy, self._topology = policy, topology
        self._local = {slot.key: (slot, parameter) for slot, parameter in slots(policy, topology)}
        self._plan = self._gather_plan()

    def _gather_plan(self) -> list[tuple[Slot, tuple[int, ...], torch.dtype, list[int]]]:
        """(slot, piece shape, dtype, source rank of each piece), in one order that all ranks share."""
        here = self._topology
        owned = []
        for key, (slot, parameter) in self._local.items():
            over_tp = slot.over == "tp"
            owns = (here.dp_rank == 0 and here.cp_rank == 0) if over_tp else here.expert_dp_rank == 0
            index = 0 if slot.cut == "none" else (here.tp_rank if over_tp else here.etp_rank)
            if owns and not (slot.cut == "none" and here.tp_rank > 0):
                owned.append((key, slot, tuple(parameter.shape), parameter.dtype, index))
        sources: dict[str, dict[int, int]] = {}
        about: dict[str, tuple] = {}
        for rank, items in enumerate(here.gather_objects(owned)):
            for key, slot, shape, dtype, index in items:
                about[key] = (slot, shape, dtype)
                sources.setdefault(key, {})[index] = rank
        return [(*about[key], [sources[key][i] for i in sorted(sources[key])]) for key in sorted(about)]

    @torch.no_grad()
    def __call__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Named tensors on rank 0; other ranks must iterate too (they send, and yield nothing)."""
        here = self._topology
        for slot, shape, dtype, ranks in self._plan:
            pieces = []
            for source in ranks:
                if source == here.rank == 0:
                    pieces.append(self._local[slot.key][1].detach())
                elif source == here.rank:
                    dist.send(self._local[slot.key][1].detach().contiguous(), dst=0)
                elif here.rank == 0:
                    piece = torch.empty(shape, dtype=dtype, device=here.device)
                    dist.recv(piece, src=source)
                    pieces.append(piece)
            if here.rank == 0:
                yield from unshard(slot, self._policy.config, pieces)
