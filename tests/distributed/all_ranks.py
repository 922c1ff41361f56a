"""Parameters over all ranks of a layout, from one rank of each pipeline stage."""

from __future__ import annotations

import gc

from megatron_rl.config.schema import Config
from megatron_rl.model.network import Network
from megatron_rl.rehearsal.ranks import distinct_ranks
from megatron_rl.rehearsal.step import build_only


def parameters_of_all_ranks(config: Config, network: Network) -> int:
    """Builds one rank of each stage on fake tensors; the others of the stage hold as many of their own."""
    parallel, total = config.parallel, 0
    stages = {rank * parallel.pp // parallel.world_size: rank for rank in reversed(distinct_ranks(parallel))}
    assert len(stages) == parallel.pp
    for rank in stages.values():
        elements = build_only(config, network, rank)
        gc.collect()
        total += elements.whole + parallel.tp * elements.split + parallel.ep * parallel.etp * elements.experts
    return total
