"""Every Megatron parameter of a network as a Slot: its Hugging Face tensors, their shapes, and how ranks cut it.

The parameters and cuts are Megatron's and the same for all networks; the names come from families/. Shapes of
checkpoints, parameter counts and both directions of convert.py follow from these slots. No megatron here.
Letters in comments: V vocabulary, H hidden size, D head dimension, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from megatron_rl.model.families import FAMILIES
from megatron_rl.model.families.base import Family
from megatron_rl.model.network import Network

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One whole Megatron parameter.

    names: its Hugging Face tensors, one for each part, or one that holds all parts in order. parts: their shapes.
    cut: what the ranks of the group `over` share out. groups: rows of all parts are interleaved in so many groups
    (key-value groups of attention); None: as many as ranks, so that each rank stacks its share of every part.
    frozen_dtype: set for a buffer, which no optimiser moves and which is stored in this dtype whatever the others are.
    """

    names: tuple[str, ...]
    parts: tuple[Shape, ...]
    cut: Literal["none", "rows", "columns"]
    over: Literal["tp", "etp"] = "tp"
    groups: int | None = None
    frozen_dtype: torch.dtype | None = None

    @property
    def key(self) -> str:
        return self.names[0]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Hugging Face name -> shape."""
        if len(self.names) == len(self.parts):
            return dict(zip(self.names, self.parts, strict=True))
        return {self.key: (sum(part[0] for part in self.parts), *self.parts[0][1:])}

    def shard(self, tensors: list[torch.Tensor], rank: int, size: int) -> torch.Tensor:
        """This rank's piece of the Megatron parameter, from the whole Hugging Face tensors."""
        if self.cut == "none":
            return tensors[0]
        if self.cut == "columns":
            return tensors[0].chunk(size, 1)[rank]
        parts = tensors if len(tensors) == len(self.parts) else tensors[0].split([part[0] for part in self.parts])
        interleaved = torch.cat([part.unflatten(0, (self.groups or size, -1)) for part in parts], dim=1)
        return interleaved.chunk(size)[rank].flatten(0, 1)

    def unshard(self, pieces: list[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """The whole Hugging Face tensors, named, from the pieces of all ranks in order."""
        if self.cut != "rows":
            return [(self.key, pieces[0] if self.cut == "none" else torch.cat(pieces, 1))]
        groups = self.groups or len(pieces)
        interleaved = torch.cat(pieces).unflatten(0, (groups, -1))
        parts = [part.flatten(0, 1) for part in interleaved.split([part[0] // groups for part in self.parts], dim=1)]
        return list(zip(self.names, parts if len(self.names) == len(parts) else [torch.cat(parts)], strict=True))


def network_slots(network: Network, *, mtp: bool = False) -> dict[str, Slot]:
    """Megatron parameter -> Slot, layers and experts by their global numbers. A tied head has no slot of its own.

    mtp: with the layer behind the last, as model.mtp trains it.
    """
    family, table = FAMILIES[network.model_type], (network.vocab_size, network.hidden_size)
    found = {"embedding.word_embeddings.weight": _slot(family, "embedding.word_embeddings.weight", "rows", [table]),
             "decoder.final_layernorm.weight": _slot(family, "decoder.final_layernorm.weight", "none",
                                                     [(network.hidden_size,)])}
    if not network.tie_word_embeddings:
        found["output_layer.weight"] = _slot(family, "output_layer.weight", "rows", [table])
    for layer in range(network.num_hidden_layers):
        found |= _layer_slots(network, layer)
    return found | (_mtp_slots(network) if mtp else {})


def _slot(family: Family, name: str, cut: str, parts: list[Shape], *, prefix: str = "", expert: int = 0, **how) -> Slot:
    names = tuple(prefix + known.format(expert=expert) for known in family.names[name])
    return Slot(names, tuple(parts), cut, **how)


def _layer_slots(network: Network, layer: int) -> dict[str, Slot]:
    family = FAMILIES[network.model_type]
    prefix = family.layer_prefix.format(layer=layer)
    return {f"decoder.layers.{layer}.{name.format(expert=how.get('expert', 0))}":
            _slot(family, name, cut, parts, prefix=prefix, **how)
            for name, cut, parts, how in (*_norms(network), *_attention(network), *_feed_forward(network, layer))}


def _norms(network: Network) -> Iterator[tuple]:
    """(parameter, cut, shapes of its parts, more of the slot) of one layer's norms."""
    yield "input_layernorm.weight", "none", [(network.hidden_size,)], {}
    yield "pre_mlp_layernorm.weight", "none", [(network.hidden_size,)], {}


def _mtp_slots(network: Network) -> dict[str, Slot]:
    family, behind, hidden = FAMILIES[network.model_type], network.num_hidden_layers, network.hidden_size
    prefix = family.layer_prefix.format(layer=behind)
    found = {name.replace(f"decoder.layers.{behind}.", "mtp.layer."): slot
             for name, slot in _layer_slots(network, behind).items()}
    for part, shape in (("enorm", (hidden,)), ("hnorm", (hidden,)), ("eh_proj", (hidden, 2 * hidden)),
                        ("final_layernorm", (hidden,))):
        found[f"mtp.{part}.weight"] = _slot(family, f"mtp.{part}.weight", "none", [shape], prefix=prefix)
    return found


def _attention(network: Network) -> Iterator[tuple]:
    """The same of its attention."""
    hidden, dim = network.hidden_size, network.head_dim
    if network.kv_lora_rank:
        yield from _latent_attention(network)
        return
    rows = [heads * dim for heads in (network.num_attention_heads, *[network.num_key_value_heads] * 2)]
    groups = {"groups": network.num_key_value_heads}
    yield "self_attention.linear_qkv.weight", "rows", [(n, hidden) for n in rows], groups
    if network.qkv_bias:
        yield "self_attention.linear_qkv.bias", "rows", [(n,) for n in rows], groups
    if network.qk_norm:
        yield "self_attention.q_layernorm.weight", "none", [(dim,)], {}
        yield "self_attention.k_layernorm.weight", "none", [(dim,)], {}
    yield "self_attention.linear_proj.weight", "columns", [(hidden, rows[0])], {}


def _latent_attention(network: Network) -> Iterator[tuple]:
    """What leads down to a latent vector is whole on every rank, what leads up from it is cut by heads."""
    hidden, heads, latent, queries = (network.hidden_size, network.num_attention_heads, network.kv_lora_rank,
                                      network.q_lora_rank)
    if queries:
        yield "self_attention.linear_q_down_proj.weight", "none", [(queries, hidden)], {}
        yield "self_attention.q_layernorm.weight", "none", [(queries,)], {}
        yield "self_attention.linear_q_up_proj.weight", "rows", [(heads * network.head_dim, queries)], {}
    else:
        yield "self_attention.linear_q_proj.weight", "rows", [(heads * network.head_dim, hidden)], {}
    yield "self_attention.linear_kv_down_proj.weight", "none", [(latent + network.qk_rope_head_dim, hidden)], {}
    yield "self_attention.kv_layernorm.weight", "none", [(latent,)], {}
    yield "self_attention.linear_kv_up_proj.weight", "rows", [
        (heads * (network.qk_nope_head_dim + network.v_head_dim), latent)], {}
    yield "self_attention.linear_proj.weight", "columns", [(hidden, heads * network.v_head_dim)], {}


def _feed_forward(network: Network, layer: int) -> Iterator[tuple]:
    """The same of one layer's dense MLP, or of its router, experts and shared experts."""
    hidden = network.hidden_size

    def mlp(prefix: str, width: int, **how) -> Iterator[tuple]:
        yield f"{prefix}.linear_fc1.weight", "rows", [(width, hidden)] * 2, how  # gate, up
        yield f"{prefix}.linear_fc2.weight", "columns", [(hidden, width)], how

    if network.is_dense_layer(layer):
        yield from mlp("mlp", network.intermediate_size)
        return
    yield "mlp.router.weight", "none", [(network.num_experts, hidden)], {}
    if network.expert_bias:
        yield "mlp.router.expert_bias", "none", [(network.num_experts,)], {"frozen_dtype": torch.float32}
    for expert in range(network.num_experts):
        yield from mlp("mlp.experts.local_experts.{expert}", network.moe_intermediate_size, over="etp", expert=expert)
    if network.num_shared_experts:
        yield from mlp("mlp.shared_experts", network.shared_intermediate_size)
        if network.shared_expert_gate:
            yield "mlp.shared_experts.gate_weight", "none", [(1, hidden)], {}


def expected_shapes(network: Network, *, mtp: bool = False) -> dict[str, Shape]:
    """Every tensor name of the network's checkpoint that a policy holds, with its shape."""
    return {name: shape for slot in network_slots(network, mtp=mtp).values() for name, shape in slot.shapes.items()}


def behind_prefixes(network: Network) -> tuple[str, ...]:
    """What the names of tensors of layers behind the last begin with."""
    prefix, first = FAMILIES[network.model_type].layer_prefix, network.num_hidden_layers
    return tuple(prefix.format(layer=first + index) for index in range(network.num_nextn_predict_layers))


def carried(network: Network, names: Iterable[str], *, mtp: bool = False) -> list[str]:
    """Those of `names` that belong to layers behind the last and that no policy holds, in order: whatever they hold
    goes to exports as it is."""
    held = expected_shapes(network, mtp=True) if mtp else {}
    return sorted(name for name in names if name.startswith(behind_prefixes(network)) and name not in held)


def frozen_names(network: Network, *, mtp: bool = False) -> set[str]:
    """The buffers' tensors, which are stored in a dtype of their own."""
    return {slot.key for slot in network_slots(network, mtp=mtp).values() if slot.frozen_dtype is not None}


@functools.lru_cache(maxsize=16)  # a search for layouts asks a thousand times
def count_parameters(network: Network) -> tuple[int, int]:
    """(total, active) parameters of the network.

    total: every tensor that is built. active: those that one token passes through, that is total less,
    in each MoE layer, the routed experts that are not chosen; the embedding table and the head count whole,
    which is how Ling-lite comes to 2.75B (2.49B without its embedding table).
    """
    total = sum(prod(part) for slot in network_slots(network).values() for part in slot.parts)
    expert = 3 * network.hidden_size * network.moe_intermediate_size
    idle_experts = network.num_moe_layers * (network.num_experts - network.num_experts_per_tok)
    return total, total - idle_experts * expert
