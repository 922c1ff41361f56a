"""The engine's experts reach the ranks that train on their tokens, and no others hold them."""

import json

import pytest

from tests.distributed.conftest import run_worker

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("world_size", "data_ranks"), [
    (2, {"ep2": 2, "cp2": 1}), (4, {"tp2_dp2_ep2": 2, "pp2_ep2": 2, "tp2_pp2_ep2": 1})])
def test_every_rank_gets_the_experts_that_rank_0_received_for_its_samples(world_size, data_ranks, tmp_path):
    run_worker(("tests.distributed.share_worker",), tmp_path, world_size, list(data_ranks))
    found = {layout: json.loads((tmp_path / f"{layout}.json").read_text()) for layout in data_ranks}
    assert found == {layout: {"dp": dp, "in turn": True, "all to the first": True, "all to the last": True}
                     for layout, dp in data_ranks.items()}
