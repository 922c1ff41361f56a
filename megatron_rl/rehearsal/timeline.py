"""The update of several pipeline stages on one clock: each stage's recorded events in order, joined at its messages.

A stage runs its operations and collectives one after another (roofline.py). A message leaves when its stage comes to
the send and arrives after its transfer; the receiving stage waits for it where it uses it first. Sending keeps no stage
waiting. The k-th message from one rank to another meets the k-th receive there.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rl.rehearsal.recorder import Collective, Operation, Receipt
from megatron_rl.rehearsal.roofline import Rates, collective_seconds, operation_seconds

Event = Operation | Collective | Receipt
SHOWN_SECONDS = 1e-4
"""Shorter collectives are drawn as part of the computation around them."""


@dataclass(frozen=True)
class Slice:
    """What one rank does from `start` for `seconds`; name: compute, wait, or a collective and its line."""

    rank: int
    name: str
    start: float
    seconds: float


@dataclass
class _Stage:
    rank: int
    events: deque[Event]
    clock: float = 0.0
    computed: float = 0.0
    slices: list[Slice] = field(default_factory=list)

    def compute(self, seconds: float) -> None:
        self.clock += seconds
        self.computed += seconds

    def show(self, name: str, seconds: float) -> None:
        """A slice from now on, after the computation that came before it."""
        self.flush()
        if seconds > 0:
            self.slices.append(Slice(self.rank, name, self.clock, seconds))
        self.clock += seconds

    def flush(self) -> None:
        if self.computed > 0:
            self.slices.append(Slice(self.rank, "compute", self.clock - self.computed, self.computed))
        self.computed = 0.0


def simulate(events: Mapping[int, Sequence[Event]], rates: Rates) -> dict[int, list[Slice]]:
    """Rank -> its slices in order. events: of each rank, of one phase, in order.

    A message from a rank that is not among them keeps nobody waiting. RuntimeError if the ranks wait for each other.
    """
    stages = {rank: _Stage(rank, deque(each)) for rank, each in events.items()}
    arrivals: dict[tuple[int, int], list[float]] = defaultdict(list)
    while any(stage.events for stage in stages.values()):
        moved = [_advance(stage, stages, arrivals, rates) for stage in stages.values()]
        if not any(moved):
            raise RuntimeError(f"ranks {sorted(rank for rank, stage in stages.items() if stage.events)} wait for each "
                               "other's messages")
    for stage in stages.values():
        stage.flush()
    return {rank: stage.slices for rank, stage in stages.items()}


def _advance(stage: _Stage, stages: Mapping[int, _Stage], arrivals, rates: Rates) -> bool:
    """Run one stage as far as it comes; whether it came anywhere."""
    moved = False
    while stage.events:
        event = stage.events[0]
        if isinstance(event, Operation):
            stage.compute(operation_seconds(event, rates))
        elif isinstance(event, Receipt):
            if event.peer in stages:
                arrived = arrivals[event.peer, stage.rank]
                if event.index >= len(arrived):
                    return moved
                stage.show("wait", max(0.0, arrived[event.index] - stage.clock))
        elif event.operation == "send":
            arrivals[stage.rank, _other(event, stage.rank)].append(stage.clock + collective_seconds(event, rates))
        elif (seconds := collective_seconds(event, rates)) < SHOWN_SECONDS:
            stage.compute(seconds)
        else:
            stage.show(f"{event.operation}, {event.where}", seconds)
        stage.events.popleft()
        moved = True
    return moved


def _other(message: Collective, rank: int) -> int:
    return next(each for each in message.ranks if each != rank)


def waiting_share(slices: Mapping[int, Sequence[Slice]]) -> dict[int, float]:
    """Rank -> the share of the whole time in which it waits for a message or has ended before the others."""
    end = max((each.start + each.seconds for rows in slices.values() for each in rows), default=0.0)
    return {rank: 1 - sum(each.seconds for each in rows if each.name != "wait") / end for rank, rows in slices.items()}


def perfetto(slices: Mapping[int, Sequence[Slice]], names: Mapping[int, str]) -> dict:
    """Chrome's trace format, which ui.perfetto.dev opens: one process a rank; microseconds."""
    titles = [{"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": names[rank]}}
              for rank in slices]
    return {"traceEvents": titles + [
        {"name": each.name, "ph": "X", "pid": rank, "tid": 0, "ts": 1e6 * each.start, "dur": 1e6 * each.seconds}
        for rank, rows in slices.items() for each in rows]}
