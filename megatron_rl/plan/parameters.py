"""Elements of every parameter that one rank holds, by pipeline stage; checked against Megatron's own in tests/."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.model.network import Network


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
    return [_chunk(model, parallel, range(index * per_chunk, (index + 1) * per_chunk), first=index == 0,
                   last=index == virtual - 1)
            for index in range(stage, virtual, parallel.pp)]


def _chunk(model: Network, parallel: ParallelConfig, layers: range, *, first: bool, last: bool) -> Chunk:
    hidden = model.hidden_size
    vocabulary = model.vocab_size // parallel.tp * hidden
    dense = [vocabulary] if first else []
    experts: list[int] = []
    for layer in layers:
        dense += _attention(model, parallel.tp)
        if model.is_dense_layer(layer):
            dense += _mlp(hidden, model.intermediate_size // parallel.tp)
            continue
        dense.append(model.num_experts * hidden)
        if model.num_shared_experts:
            dense += _mlp(hidden, model.shared_intermediate_size // parallel.tp)
        experts += model.num_experts // parallel.ep * _mlp(hidden, model.moe_intermediate_size // parallel.etp)
    dense += [hidden, vocabulary] if last else []
    return Chunk(layers, first, last, tuple(dense), tuple(experts))


def _attention(model: Network, tp: int) -> list[int]:
    """Two norms, the fused query-key-value projection and the output projection."""
    hidden, dim = model.hidden_size, model.head_dim
    rows = (model.num_attention_heads + 2 * model.num_key_value_heads) * dim // tp
    return [hidden, hidden, rows * hidden, hidden * model.num_attention_heads * dim // tp]


def _mlp(hidden: int, width: int) -> list[int]:
    """Gate and up projections fused, then the down projection."""
    return [2 * width * hidden, hidden * width]
