"""Two stages on one clock, worked by hand."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_rl.rehearsal.recorder import Collective, Operation, Receipt, Wait
from megatron_rl.rehearsal.roofline import Rates
from megatron_rl.rehearsal.step import rehearse
from megatron_rl.rehearsal.summary import reduces_gradients
from megatron_rl.rehearsal.timeline import Slice, elapsed, perfetto, simulate, waiting_share
from tests.megatron_rl.rehearsal.tiny import NETWORK, WORKLOAD, tiny_config

RATES = Rates(flops=1.0, matrix_share=1.0, memory=1.0, bandwidth_share=1.0, nvlink=1.0, kernel=0.0, nvlink_latency=0.0)
"""One FLOP and one byte take a second."""


def work(seconds: int) -> Operation:
    return Operation("update", "aten.mm", seconds, 0)


def send(ranks: tuple[int, int], seconds: int = 1) -> Collective:
    return Collective("update", "send", ranks, seconds, "line")


def first_use(peer: int, index: int = 0) -> Receipt:
    return Receipt("update", peer, index)


def gather() -> Collective:
    """Half of its 4 bytes leaves each of two ranks."""
    return Collective("update", "all-gather", (0, 1), 4, "line")


def ours(slices: list[Slice]) -> list[Slice]:
    """Without those of the links."""
    return [each for each in slices if not each.lane]


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
    events = [first_use(5), work(1), gather(), Wait("update", 0), work(1)]
    assert ours(simulate({0: events}, RATES)[0]) == [
        Slice(0, "compute", 0, 1), Slice(0, "all-gather, line", 1, 2), Slice(0, "compute", 3, 1)]


def test_what_is_started_ahead_overlaps_until_it_is_waited_for():
    """Two gathers of 2 s share the link, from 1 to 3 and to 5. 3 s of work hide the first; the second is waited for."""
    events = [work(1), gather(), gather(), work(3), Wait("update", 0), Wait("update", 1), work(1)]
    slices = simulate({0: events}, RATES)[0]
    assert ours(slices) == [Slice(0, "compute", 0, 4), Slice(0, "all-gather, line", 4, 1), Slice(0, "compute", 5, 1)]
    assert [each for each in slices if each.lane] == [Slice(0, "all-gather, line", 1, 2, "nvlink"),
                                                      Slice(0, "all-gather, line", 3, 2, "nvlink")]
    assert elapsed(events, RATES) == 6 and elapsed(events, RATES, lambda call: True) == 5


def test_ranks_that_wait_for_each_other_are_named():
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] wait for each other"):
        simulate({0: [first_use(1)], 1: [first_use(0)]}, RATES)


def test_a_message_may_be_used_after_a_later_one():
    """Rank 0 uses the second of two messages, which arrive at 2 and 4, before the first."""
    slices = simulate({0: [first_use(1, 1), work(1), first_use(1, 0), work(1)],
                       1: [work(1), send((0, 1)), work(2), send((0, 1))]}, RATES)
    assert slices[0] == [Slice(0, "wait", 0, 4), Slice(0, "compute", 4, 1), Slice(0, "compute", 5, 1)]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_shared_expert_lies_between_the_start_and_the_end_of_each_dispatch(recompute):
    """Forward, recomputed and backward; the exchange of the rows comes first, that of their weights after it."""
    config = tiny_config(world_size=2, ep=2, overlap_shared_experts=True)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, recompute=recompute))
    found = rehearse(config, NETWORK, 0, WORKLOAD).recorder
    passes = {"old log-probabilities": 1, "update": 2 if recompute == "none" else 3}
    for phase, times in passes.items():
        under_way, hidden, started = {}, [], 0
        for event in (each for each in found.events if each.phase == phase):
            if isinstance(event, Wait):
                hidden.append(under_way.pop(event.index))
            elif isinstance(event, Collective):
                under_way[started] = 0
                started += 1
            elif event.name == "aten.mm":
                under_way = {place: products + 1 for place, products in under_way.items()}
        products = sorted(count for count in hidden if count)
        forward = [2, 2] * (times if recompute == "full" and phase == "update" else 1)
        backward = [4, 4] if phase == "update" else []
        assert products == sorted((forward[:-2] if recompute == "full" and phase == "update" else forward) + backward)


def test_gradients_are_reduced_while_the_backward_pass_goes_on():
    """The experts' bucket is complete before the dense first layer has its gradient."""
    found = rehearse(tiny_config(world_size=4, ep=2, overlap=True), NETWORK, 0, WORKLOAD).recorder
    events = [event for event in found.events if event.phase == "update"]
    started = [place for place, event in enumerate(events) if isinstance(event, Collective)]
    experts, dense = (place for place in started if reduces_gradients(events[place]))
    waited = events.index(Wait("update", started.index(experts)))
    assert sum(isinstance(event, Operation) for event in events[experts:dense]) > 10 and dense < waited
