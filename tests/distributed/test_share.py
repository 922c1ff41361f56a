"""Every rank trains on the shard of its replica, which crosses the wire from the orchestrator once."""

import json

import pytest

from tests.distributed.conftest import run_worker

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("world_size", "data_ranks"), [
    (2, {"ep2": 2, "cp2": 1}), (4, {"tp2_dp2_ep2": 2, "pp2_ep2": 2, "tp2_pp2_ep2": 1})])
def test_one_rank_of_each_replica_pulls_for_all_of_it(world_size, data_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_RL_RUN_KEY", "unused")
    run_worker(("tests.distributed.share_worker",), tmp_path, world_size, list(data_ranks))
    found = {layout: json.loads((tmp_path / f"{layout}.json").read_text()) for layout in data_ranks}
    assert found == {layout: {"own": True, "pulled": [f"/step/7/shard/{rank}" for rank in range(dp)]}
                     for layout, dp in data_ranks.items()}
