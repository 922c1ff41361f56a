"""Two stages on one clock, worked by hand."""

from __future__ import annotations

import pytest

from megatron_rl.rehearsal.recorder import Collective, Operation, Receipt
from megatron_rl.rehearsal.roofline import Rates
from megatron_rl.rehearsal.timeline import Slice, perfetto, simulate, waiting_share

RATES = Rates(flops=1.0, matrix_share=1.0, memory=1.0, bandwidth_share=1.0, nvlink=1.0, kernel=0.0, nvlink_latency=0.0)
"""One FLOP and one byte take a second."""


def work(seconds: int) -> Operation:
    return Operation("update", "aten.mm", seconds, 0)


def send(ranks: tuple[int, int], seconds: int = 1) -> Collective:
    return Collective("update", "send", ranks, seconds, "line")


def first_use(peer: int, index: int = 0) -> Receipt:
    return Receipt("update", peer, index)


def test_a_stage_waits_for_the_message_that_it_needs():
    """Rank 0: forward 2, send (arrives at 3), forward 2, send (5), then two backwards when their gradients come.

    Rank 1 takes 3 + 4 = 7 a micro-batch: the first from 3 to 10, whose gradient arrives at 11, the second to 17 (18).
    """
    pair = (0, 1)
    first = [work(2), send(pair), work(2), send(pair), first_use(1, 0), work(4), first_use(1, 1), work(4)]
    last = [first_use(0, 0), work(7), send(pair), first_use(0, 1), work(7), send(pair)]
    slices = simulate({0: first, 1: last}, RATES)
    assert slices[0] == [Slice(0, "compute", 0, 4), Slice(0, "wait", 4, 7), Slice(0, "compute", 11, 4),
                         Slice(0, "wait", 15, 3), Slice(0, "compute", 18, 4)]
    assert slices[1] == [Slice(1, "wait", 0, 3), Slice(1, "compute", 3, 7), Slice(1, "compute", 10, 7)]
    assert waiting_share(slices) == {0: pytest.approx(10 / 22), 1: pytest.approx(8 / 22)}
    drawn = perfetto(slices, {0: "rank 0", 1: "rank 1"})["traceEvents"]
    assert {"name": "wait", "ph": "X", "pid": 0, "tid": 0, "ts": 4e6, "dur": 7e6} in drawn


def test_collectives_are_shown_and_messages_of_ranks_that_are_not_there_wait_for_nothing():
    events = [first_use(5), work(1), Collective("update", "all-gather", (0, 1), 4, "line"), work(1)]
    assert simulate({0: events}, RATES)[0] == [  # half of 4 bytes leaves each of two ranks
        Slice(0, "compute", 0, 1), Slice(0, "all-gather, line", 1, 2), Slice(0, "compute", 3, 1)]


def test_ranks_that_wait_for_each_other_are_named():
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] wait for each other"):
        simulate({0: [first_use(1)], 1: [first_use(0)]}, RATES)


def test_a_message_may_be_used_after_a_later_one():
    """Rank 0 uses the second of two messages, which arrive at 2 and 4, before the first."""
    slices = simulate({0: [first_use(1, 1), work(1), first_use(1, 0), work(1)],
                       1: [work(1), send((0, 1)), work(2), send((0, 1))]}, RATES)
    assert slices[0] == [Slice(0, "wait", 0, 4), Slice(0, "compute", 4, 1), Slice(0, "compute", 5, 1)]
