"""The way of the engine's experts: asked for and received by rank 0, replayed by all ranks.

They are many bytes (layers * top-k per token), and the budget drops responses: groups travel without them, and what
the cut has kept follows as uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.batch import StepBatch
from megatron_rl.config.schema import Config
from megatron_rl.model.architectures import read_config
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.topology import Topology
from megatron_rl.types import RolloutGroup


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


def share_routed_experts(batch: StepBatch, topology: Topology, shape: tuple[int, int]) -> StepBatch:
    """`batch` with the routed_experts of rank 0's samples, [positions, *shape], on every rank."""
    if not batch.samples:
        return batch
    lengths = [len(sample.token_ids) - 1 for sample in batch.samples]
    if topology.is_main:
        experts = np.ascontiguousarray(np.concatenate([sample.routed_experts for sample in batch.samples]))
    else:
        experts = np.empty((sum(lengths), *shape), dtype=np.uint8)
    topology.broadcast_array(experts)
    parts = np.split(experts, np.cumsum(lengths)[:-1])
    return replace(batch, samples=tuple(replace(sample, routed_experts=part)
                                        for sample, part in zip(batch.samples, parts, strict=True)))
