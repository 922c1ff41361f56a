"""A recorder on real tensors, with figures worked by hand."""

from __future__ import annotations

import gc

import torch

from megatron_rl.rehearsal.recorder import Collective, Operation, Recorder
from megatron_rl.rehearsal.roofline import Rates, collective_seconds, link

HERE = "test_recorder.py"


def test_a_peak_is_what_was_alive_together_and_names_who_made_it():
    recorder = Recorder()
    with recorder:
        with recorder.phase("first", "kept"):
            kept = torch.zeros(1000)  # 4,000 bytes
            short = kept + 1  # 8,000 in all: the peak
            del short
            after = torch.zeros(500, dtype=torch.bfloat16)  # 5,000
            view = kept.view(10, 100)  # no storage of its own
        with recorder.phase("second", "more"):
            last = torch.ones(250)  # 6,000
    first, second = recorder.peaks["first"], recorder.peaks["second"]
    assert (first.total, first.kinds) == (8000, {"kept": 8000})
    assert (second.total, second.kinds) == (6000, {"kept": 5000, "more": 1000})
    assert {(made.operation, made.shape, count) for made, _, count in first.largest(0.1)} == {
        ("aten.zeros", (1000,), 1), ("aten.add", (1000,), 1)}
    assert all(HERE in made.where for made in first.tensors)
    assert recorder.storages.now().total == 6000
    del kept, after, last
    assert recorder.storages.now().total == 4000  # the view keeps its storage alive
    del view
    gc.collect()
    assert recorder.storages.now().total == 0


def test_relabelled_storages_keep_their_bytes_under_the_new_kind():
    recorder = Recorder()
    with recorder, recorder.phase("build", "weights"):
        gradients = torch.zeros(10)
        weights = torch.zeros(20)
        recorder.storages.relabel([gradients], "gradients")
    assert recorder.peaks["build"].kinds == {"gradients": 40, "weights": 80}
    assert len(weights) == 20


def test_operations_have_the_flops_and_bytes_of_their_shapes():
    recorder = Recorder()
    left, right = torch.ones(10, 100), torch.ones(100, 5)
    with recorder, recorder.phase("products", "out"):
        total = left @ right
        total.addmm_(left, right)
        total.t()  # a view moves nothing
    # 2 x 10 x 100 x 5 FLOPs; mm reads 1,000 + 500 and writes 50 elements, addmm_ also reads the 50
    assert recorder.operations == {Operation("products", "aten.mm", 10_000, 4 * 1550): 1,
                                   Operation("products", "aten.addmm_", 10_000, 4 * 1600): 1}


def test_bytes_are_those_that_a_kernel_moves_and_not_those_of_the_shapes():
    recorder = Recorder()
    table, rows, one = torch.ones(1000, 8), torch.tensor([3, 5, 7]), torch.ones(())
    three = torch.ones(3, 8)
    with recorder:
        def moved(call):
            recorder.operations.clear()
            with recorder.phase("here", "out"):
                call()
            return sum(each.bytes * count for each, count in recorder.operations.items())

        # elements of 4 bytes, indices of 8
        assert moved(lambda: table.index_select(0, rows)) == 3 * 8 + 2 * 24 * 4  # the rows, read and written
        index = rows[:, None].expand(3, 8)  # 3 indices in memory
        assert moved(lambda: table.gather(0, index)) == 3 * 8 + 2 * 24 * 4
        assert moved(lambda: table.scatter_add_(0, index, one.expand(3, 8))) == 3 * 8 + 4 + 2 * 24 * 4
        assert moved(lambda: table.index_add_(0, rows, three)) == 3 * 8 + 3 * 24 * 4
        assert moved(lambda: table.index_add(0, rows, three)) == 3 * 8 + 3 * 24 * 4 + 2 * 8000 * 4  # of a copy
        assert moved(lambda: torch.zeros_like(table)) == 8000 * 4
        assert moved(lambda: table.fill_(2.0)) == 8000 * 4
        assert moved(lambda: torch.ops.aten._unsafe_view(table, [8000])) == 0
        assert moved(lambda: torch._foreach_mul_([table], 2.0)) == 2 * 8000 * 4


def test_causal_attention_counts_the_pairs_that_a_query_sees():
    recorder = Recorder()
    q = torch.ones(1, 2, 6, 8)
    with recorder, recorder.phase("attention", "out"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    # 2 heads x 6 x 7 / 2 pairs x 8 dimensions x 4 FLOPs (score and weighted value)
    assert sum(each.flops * count for each, count in recorder.operations.items()) == 2 * 21 * 8 * 4


def test_a_read_by_the_host_is_named_with_its_line():
    recorder = Recorder()
    with recorder, recorder.phase("reading", "out"):
        torch.ones(3).sum().item()
    ((phase, where), count), = recorder.host_reads.items()
    assert (phase, count) == ("reading", 1) and HERE in where and "test_a_read_by_the_host" in where


def test_seconds_of_a_collective_come_from_its_bytes_and_its_link():
    rates = Rates()
    inside, across, strided = tuple(range(8)), tuple(range(16)), tuple(range(0, 64, 8))
    assert [link(ranks, rates) for ranks in (inside, across, strided)] == ["nvlink", "network", "network"]

    def seconds(operation, ranks):
        return collective_seconds(Collective("update", operation, ranks, 10**9, "line"), rates)

    assert seconds("all-gather", inside) == 7 / 8 * 1e9 / (0.7 * 200e9) + 12e-6
    assert seconds("all-reduce", across) == 2 * 15 / 16 * 1e9 / (0.7 * 200e9) + 25e-6  # 8 cards of a node: 400 GB/s
    assert seconds("reduce-scatter", strided) == 7 / 8 * 1e9 / (0.7 * 50e9) + 25e-6  # one card each
    assert seconds("send", strided) == 1e9 / (0.7 * 50e9) + 25e-6
    assert seconds("all-gather", (3,)) == 0.0
