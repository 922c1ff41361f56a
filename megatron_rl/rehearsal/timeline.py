"""The update of several pipeline stages on one clock: each stage's recorded events in order, joined at its messages.

A stage runs its operations one after another (roofline.py). A collective starts when its stage comes to it and the
link is free, and the stage goes on until its code waits for it. So what the code starts ahead overlaps, and costs the
computation beside it nothing. A message leaves when its stage comes to the send and arrives after its transfer; the
receiving stage waits for it where it uses it first. Sending keeps no stage waiting. The k-th message from one rank to
another meets the k-th receive there.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rl.rehearsal.recorder import Collective, Operation, Receipt, Wait
from megatron_rl.rehearsal.roofline import Rates, collective_seconds, link, operation_seconds

Event = Operation | Collective | Receipt | Wait
SHOWN_SECONDS = 1e-4
"""Shorter collectives are drawn as part of the computation around them."""


@dataclass(frozen=True)
class Slice:
    """What one rank does from `start` for `seconds`; name: compute, wait, or a collective and its line.

    lane: "" for the rank itself, which also waits for collectives; else the link, with what passes over it.
    """

    rank: int
    name: str
    start: float
    seconds: float
    lane: str = ""


@dataclass
class _Stage:
    rank: int
    events: deque[Event]
    clock: float = 0.0
    computed: float = 0.0
    links: dict[str, float] = field(default_factory=dict)  # link -> when it is free
    started: dict[str, list[tuple[float, str]]] = field(default_factory=dict)  # phase -> (end, name) of each
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

    def start(self, call: Collective, seconds: float, rates: Rates) -> None:
        over = link(call.ranks, rates)
        begin = max(self.clock, self.links.get(over, 0.0))
        self.links[over] = begin + seconds
        name = f"{call.operation}, {call.where}"
        self.started.setdefault(call.phase, []).append((begin + seconds, name))
        if seconds >= SHOWN_SECONDS:
            self.slices.append(Slice(self.rank, name, begin, seconds, over))

    def wait(self, event: Wait) -> None:
        end, name = self.started[event.phase][event.index]
        if (seconds := end - self.clock) >= SHOWN_SECONDS:
            self.show(name, seconds)
        else:
            self.compute(max(0.0, seconds))

    def flush(self) -> None:
        if self.computed > 0:
            self.slices.append(Slice(self.rank, "compute", self.clock - self.computed, self.computed))
        self.computed = 0.0


def simulate(events: Mapping[int, Sequence[Event]], rates: Rates,
             free: Callable[[Collective], bool] = lambda _: False) -> dict[int, list[Slice]]:
    """Rank -> its slices in order of their ends. events: of each rank, of one phase, in order.

    free: collectives that take no time here. A message from a rank that is not among them keeps nobody waiting.
    RuntimeError if the ranks wait for each other.
    """
    stages = {rank: _Stage(rank, deque(each)) for rank, each in events.items()}
    arrivals: dict[tuple[int, int], list[float]] = defaultdict(list)
    while any(stage.events for stage in stages.values()):
        moved = [_advance(stage, stages, arrivals, rates, free) for stage in stages.values()]
        if not any(moved):
            raise RuntimeError(f"ranks {sorted(rank for rank, stage in stages.items() if stage.events)} wait for each "
                               "other's messages")
    for stage in stages.values():
        stage.flush()
    return {rank: stage.slices for rank, stage in stages.items()}


def _advance(stage: _Stage, stages: Mapping[int, _Stage], arrivals, rates: Rates, free) -> bool:
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
        elif isinstance(event, Collective) and event.operation == "send":
            arrivals[stage.rank, _other(event, stage.rank)].append(stage.clock + collective_seconds(event, rates))
        elif isinstance(event, Wait):
            stage.wait(event)
        else:
            stage.start(event, 0.0 if free(event) else collective_seconds(event, rates), rates)
        stage.events.popleft()
        moved = True
    return moved


def _other(message: Collective, rank: int) -> int:
    return next(each for each in message.ranks if each != rank)


def elapsed(events: Sequence[Event], rates: Rates, free: Callable[[Collective], bool] = lambda _: False) -> float:
    """Seconds of one rank's events, as in `simulate`."""
    (slices,) = simulate({-1: events}, rates, free).values()  # no peer has this rank
    return max((each.start + each.seconds for each in slices if not each.lane), default=0.0)


def waiting_share(slices: Mapping[int, Sequence[Slice]]) -> dict[int, float]:
    """Rank -> the share of the whole time in which it waits for a message or has ended before the others."""
    end = max((each.start + each.seconds for rows in slices.values() for each in rows if not each.lane), default=0.0)
    return {rank: 1 - sum(each.seconds for each in rows
                         if each.name != "wait" and not each.lane) / end for rank, rows in slices.items()}


def perfetto(slices: Mapping[int, Sequence[Slice]], names: Mapping[int, str]) -> dict:
    """Chrome's trace format, which ui.perfetto.dev opens: one process a rank, with a thread for each link it uses;
    microseconds."""
    lanes = {lane: place for place, lane in enumerate(("", "nvlink", "network"))}
    titles = [{"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": names[rank]}}
              for rank in slices]
    titles += [{"name": "thread_name", "ph": "M", "pid": rank, "tid": place, "args": {"name": lane or "rank"}}
               for rank in slices for lane, place in lanes.items()]
    return {"traceEvents": titles + [
        {"name": each.name, "ph": "X", "pid": rank, "tid": lanes[each.lane], "ts": 1e6 * each.start,
         "dur": 1e6 * each.seconds}
        for rank, rows in slices.items() for each in rows]}
