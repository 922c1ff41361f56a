"""Reduction of metrics: sums and counts add over ranks and are divided once."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from c3po import Max, SumCount
from megatron_rl.observe.metrics import reduce_maxima, reduce_metrics


def test_mean_weighs_tokens_not_slices():
    # 3 tokens of loss 1 and 1 token of loss 5: 8 / 4 = 2, where a mean of means would say 3.
    total = SumCount(3.0, 3) + SumCount(5.0, 1)
    assert reduce_metrics({"train/loss": total}, None) == {"train/loss": 2.0}


def test_unmeasured_metric_is_left_out():
    sums = {"eval/accuracy": SumCount(0.0, 0), "reward/mean": SumCount(0.0, 4)}
    assert reduce_metrics(sums, None) == {"reward/mean": 0.0}
    assert reduce_metrics({}, None) == {}


def test_key_order_of_a_rank_does_not_matter():
    seen = []
    sums = {"b": SumCount(torch.tensor(6.0), torch.tensor(2)), "a": SumCount(1, 1)}
    reduced = [reduce_metrics(dict(items), lambda tensor: seen.append(tensor.clone()))
               for items in (sums.items(), reversed(sums.items()))]
    assert reduced[0] == reduced[1] == {"a": 1.0, "b": 3.0}
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])  # one all-reduce each, of the same layout


def test_counts_are_exact_beyond_float32():
    tokens = 2**24 + 1  # float32 rounds this to 2^24
    assert reduce_metrics({"m": SumCount(tokens, 1)}, None) == {"m": float(tokens)}


def test_maximum_is_not_added():
    assert reduce_maxima({"mismatch/max_abs": Max(2.0), "x": Max(-float("inf"))}, None) == {"mismatch/max_abs": 2.0}


def rank_main(rank: int, address: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    of_rank = ({"a": SumCount(3.0, 3), "b": SumCount(0.0, 0)}, {"b": SumCount(4.0, 2), "a": SumCount(5.0, 1)})
    means = reduce_metrics(of_rank[rank], dist.all_reduce)
    largest = reduce_maxima({"m": Max(1.0 + rank)}, lambda tensor: dist.all_reduce(tensor, op=dist.ReduceOp.MAX))
    with open(f"{out}/{rank}.json", "w", encoding="utf-8") as file:
        json.dump({**means, **largest}, file)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_agree_on_the_mean_of_all_tokens(tmp_path):
    mp.spawn(rank_main, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {"a": 2.0, "b": 2.0, "m": 2.0}  # a: (3 + 5) / (3 + 1); b: only rank 1 measured it
