"""Where the arithmetic places a rank, and where Megatron does."""

from __future__ import annotations

import pytest

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.rehearsal.ranks import check_rank, coordinates, distinct_ranks, group_name
from megatron_rl.rehearsal.world import one_rank
from tests.megatron_rl.rehearsal.tiny import NETWORK

LAYOUTS = [ParallelConfig(world_size=16, tp=2, cp=2, pp=2, ep=2, etp=2), ParallelConfig(world_size=16, tp=4, ep=4),
           ParallelConfig(world_size=12, pp=3, ep=2, cp=2)]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=["tp2_cp2_pp2_ep2_etp2", "tp4_ep4", "pp3_ep2_cp2"])
def test_a_rank_stands_where_megatron_places_it(parallel):
    firsts = {}
    for rank in range(parallel.world_size):
        with one_rank(rank, parallel, NETWORK) as here:
            found = coordinates(rank, parallel)
            assert (here.tp_rank, here.cp_rank, here.dp_rank, here.pp_rank) == (found.tp, found.cp, found.dp, found.pp)
            assert (here.etp_rank, here.ep_rank, here.expert_dp_rank) == (found.etp, found.ep, found.edp)
            firsts.setdefault(here.dp_rank, rank)
            assert here.replica_firsts[here.dp_rank] == firsts[here.dp_rank]
    assert len(firsts) == parallel.dp


def test_groups_are_named_by_the_ranks_that_they_hold():
    parallel = ParallelConfig(world_size=16, tp=2, pp=2, ep=4)
    assert group_name(tuple(range(16)), parallel) == "world"
    assert group_name((2, 3), parallel) == "tp/tp-cp"
    assert group_name((0, 8), parallel) == "pp"
    assert group_name((0, 1, 2, 3), parallel) == "ep/etp-ep"
    assert group_name((1, 5), parallel) == "expert-dp"
    assert group_name((0, 2, 4, 6), parallel) == "dp/dp-cp"
    assert group_name((0, 5), parallel) == "2 ranks"
    assert group_name((4, 12), ParallelConfig(world_size=16, pp=4)) == "pp"  # stages 1 and 3


def test_one_rank_of_each_stage_and_context_rank_stands_for_all():
    parallel = ParallelConfig(world_size=16, tp=2, cp=2, pp=2)
    assert distinct_ranks(parallel) == [0, 2, 8, 10]
    check_rank(15, parallel)
    with pytest.raises(ValueError, match=r"rank=16: parallel\.world_size=16 has the ranks 0 to 15"):
        check_rank(16, parallel)
