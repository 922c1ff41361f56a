"""Layouts that the machine at hand cannot run are refused before a rank waits for another."""

from __future__ import annotations

import pytest
import torch

from megatron_rl import topology
from megatron_rl.config.schema import ParallelConfig

WITHOUT_A_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about gloo, which a GPU's ranks do not use")


@WITHOUT_A_GPU
@pytest.mark.parametrize("sizes", [{"tp": 2, "ep": 2}, {"tp": 1}])
def test_gathering_rows_of_different_number_needs_a_gpu(sizes):
    with pytest.raises(ValueError, match=r"parallel\.etp=2 .*parallel\.token_dispatcher=allgather"):
        topology.start(ParallelConfig(world_size=4, etp=2, **sizes), seed=0)


@WITHOUT_A_GPU
@pytest.mark.parametrize("sizes", [
    {"tp": 2}, {"cp": 2}, {"tp": 2, "ep": 2, "token_dispatcher": "allgather"}])
def test_ranks_that_hold_equally_many_rows_need_none(sizes):
    with pytest.raises(ValueError, match=r"parallel\.world_size=4, but 1 processes were started"):
        topology.start(ParallelConfig(world_size=4, etp=2, **sizes), seed=0)
