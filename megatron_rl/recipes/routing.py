"""The way of the engine's experts: asked for and received by rank 0, replayed by all ranks.

They are many bytes (layers * top-k per token), and the budget drops responses: groups travel without them, and what
the cut has kept follows as uint8, to the ranks that train on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.config.schema import Config
from megatron_rl.model.architectures import read_config
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.topology import Topology
from megatron_rl.types import RolloutGroup, TrainSample


def engine_routing(config: Config) -> RoutedLayers | None:
    """What to ask the engine about experts: nothing unless c3po.router_replay=rollout."""
    if config.c3po.router_replay != "rollout":
        return None
    network = read_config(config.model.path)
    layers = range(network.num_hidden_layers)
    return RoutedLayers(network.num_hidden_layers, tuple(i for i in layers if not network.is_dense_layer(i)),
                        network.num_experts_per_tok, network.num_experts)


def without_routed_experts(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    return [replace(group, rollouts=tuple(replace(rollout, routed_experts=None) for rollout in group.rollouts))
            for group in groups]


def share_routed_experts(samples: Sequence[TrainSample], places: Sequence[Sequence[int]], topology: Topology,
                         shape: tuple[int, int]) -> list[TrainSample]:
    """Collective: `samples`, where those of this data-parallel rank have the routed_experts that rank 0's have.

    places: by data-parallel rank, its samples' places in `samples`. shape: (MoE layers, experts per token).
    """
    nothing = np.empty((0, *shape), dtype=np.uint8)  # what a data-parallel rank without samples gets

    def joined(dp_rank: int) -> np.ndarray:
        return np.concatenate([nothing, *(samples[place].routed_experts for place in places[dp_rank])])

    mine = places[topology.dp_rank]
    lengths = [len(samples[place].token_ids) - 1 for place in mine]
    experts = np.empty((sum(lengths), *shape), dtype=np.uint8)
    topology.scatter_to_replicas(joined, experts)
    shared, ends = list(samples), np.cumsum(lengths, dtype=int)
    for place, end, length in zip(mine, ends, lengths, strict=True):
        shared[place] = replace(samples[place], routed_experts=experts[end - length:end])
    return shared
