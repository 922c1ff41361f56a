"""What ranks report of a step becomes one number per metric."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from megatron_rl.train_step.report import RankReport, merge_reports, read_together


def rank(stage: int, *, sums=None, largest: float | None = None, layer: int = 1) -> RankReport:
    """Router sums 2, 4, 1, 8 of each stage: balance, z, differing choices, choices."""
    return RankReport(stage, sums or {}, {} if largest is None else {"mismatch_max_abs": largest}, [2.0, 4.0, 1.0, 8.0],
                      {layer: float(layer)}, {layer: 0.5 * layer})


def test_what_a_stage_has_added_up_counts_once():
    sums = {"loss": [3.0, 2.0], "ratio": [10.0, 4.0], "mismatch_abs": [1.0, 4.0]}
    reports = [rank(0, layer=1), rank(0, layer=1), rank(1, sums=sums, layer=2), rank(1, sums=sums, layer=2)]
    merged, gauges = merge_reports(reports, num_moe_layers=2)
    assert {key: (value.sum, value.count) for key, value in merged.items()} == {
        "train/ratio": (10.0, 4.0), "mismatch/mean_abs": (1.0, 4.0), "router/replay_differing": (2.0, 16.0)}
    assert gauges == {"train/loss": 3.0, "train/balance_loss": 2.0, "train/z_loss": 4.0,
                      "router/load_max_over_mean": 1.5, "router/entropy": 0.75,
                      "router/load_max_over_mean/layer_1": 1.0, "router/load_max_over_mean/layer_2": 2.0}


@pytest.mark.parametrize("largest", list(permutations([0.3, math.nan, 0.1])))
def test_a_maximum_that_is_nan_on_one_rank_is_nan(largest):
    _, gauges = merge_reports([rank(0, largest=value) for value in largest], num_moe_layers=1)
    assert math.isnan(gauges["mismatch/max_abs"])


def test_a_maximum_is_the_largest_of_all_ranks():
    _, gauges = merge_reports([rank(0, largest=0.1), rank(0, largest=0.3), rank(1, largest=0.2)], num_moe_layers=1)
    assert gauges["mismatch/max_abs"] == 0.3


def test_router_losses_that_nobody_computed_are_left_out():
    _, gauges = merge_reports([rank(0)], num_moe_layers=0)
    assert gauges.keys() == {"router/load_max_over_mean", "router/entropy", "router/load_max_over_mean/layer_1"}


def test_numbers_and_tensors_are_read_together_and_exactly():
    """A step of the paper has 10^8 tokens, and 2^24 + 1 is no float32."""
    many = 2**24 + 1
    groups = ([torch.tensor(many), many, 0.1], [], [torch.tensor(0.1, dtype=torch.float64)])
    assert read_together(*groups) == [[many, many, 0.1], [], [0.1]]
