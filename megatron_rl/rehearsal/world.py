"""A world of any size in which only one rank runs: groups that do nothing, and the answers that object collectives owe.

topology.start runs as it is, with Megatron's groups on torch's `fake` backend. Written for torch 2.14.1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rl import topology
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.model.network import Network
from megatron_rl.rehearsal.ranks import coordinates
from megatron_rl.rehearsal.standins import replaced
from megatron_rl.topology import Topology
from megatron_rl.train_step.report import RankReport

GPUS_PER_NODE = 8
OTHER_STAGE = 1_000_000
"""Stage of the report that stands for the last pipeline stage's, which alone has a loss."""


@contextlib.contextmanager
def one_rank(rank: int, parallel: ParallelConfig, network: Network) -> Iterator[Topology]:
    """The Topology of `rank` in a world of parallel.world_size. Needs a process without a process group.

    network: of the model that will be built, because the other stages may hold kinds of parameters that this one lacks.
    ValueError if this process sees a GPU, because Megatron would then put real tensors there.
    """
    if torch.cuda.is_available():
        raise ValueError("rehearse: this process sees a GPU; start it with CUDA_VISIBLE_DEVICES= (empty)")
    assert not dist.is_initialized()
    places = {"RANK": rank, "WORLD_SIZE": parallel.world_size, "LOCAL_RANK": rank % GPUS_PER_NODE}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in places.items()}):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
        try:
            with _answers(parallel, network):
                yield topology.start(parallel, seed=0)
        finally:
            topology.stop()


@contextlib.contextmanager
def _answers(parallel: ParallelConfig, network: Network) -> Iterator[None]:
    make_group = dist.new_group
    experts_apart = network.num_moe_layers > 0 and (parallel.ep > 1 or parallel.etp != parallel.tp)

    def new_group(*args, backend=None, **kwargs):
        """A gloo group on a FakeStore is a segmentation fault."""
        return make_group(*args, backend="fake" if backend is not None else None, **kwargs)

    def all_gather_object(box, value, group=None):
        """Every rank says what this one says, but for what only other stages have.

        If this rank's report has no loss, the last stage's report stands beside it. The keys of parameter groups
        (Megatron's optimizer._get_param_groups: pairs of overrides and "is an expert's") get the other stages' experts.
        """
        box[:] = [value] * len(box)
        is_keys = isinstance(value, list) and all(isinstance(key, tuple) and isinstance(key[-1], bool) for key in value)
        if is_keys and experts_apart:
            box[-1] = [*value, (None, True)]
        if isinstance(value, RankReport) and not value.sums:
            box[-1] = dataclasses.replace(value, stage=OTHER_STAGE, sums={"loss": [1.0, 1.0]}, loads={}, entropies={})

    def replicas(control_group, timeout):
        firsts = {}
        for rank in range(parallel.world_size):
            firsts.setdefault(coordinates(rank, parallel).dp, rank)
        return None, tuple(firsts[dp] for dp in sorted(firsts))

    with (replaced(dist, new_group=new_group, all_gather_object=all_gather_object, barrier=lambda *_, **__: None,
                   broadcast_object_list=lambda *_, **__: None),
          replaced(dist.distributed_c10d, new_group=new_group),
          replaced(topology, _replicas=replicas, check_gloo=lambda _: None)):
        yield
