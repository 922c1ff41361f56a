"""Seconds of what was recorded, from stated rates: a roofline of each operation and each collective.

An operation takes the longest of its FLOPs at the matrix rate, its bytes at the memory rate and the launch of a kernel;
a copy from the host's memory or to it takes its bytes over the bus; a collective takes a latency and its bytes over the
link that its group reaches across. Nothing here was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rl.rehearsal.recorder import POINT_TO_POINT, Collective, Operation, Recorder


@dataclass(frozen=True)
class Rates:
    """Peaks of an H800 and the shares of them that a step may count on; bytes and FLOPs per second, seconds.

    nvlink: one way, within a node of gpus_per_node. network: of one GPU's card; a group that fills nodes uses every
    card of a node, other groups one each. host: what a copy between a GPU and its host's memory reaches, as `plan`
    assumes it.
    """

    flops: float = 989e12
    memory: float = 3.35e12
    nvlink: float = 200e9
    network: float = 50e9
    host: float = 25e9
    matrix_share: float = 0.45
    bandwidth_share: float = 0.70
    kernel: float = 3e-6
    nvlink_latency: float = 12e-6
    network_latency: float = 25e-6
    gpus_per_node: int = 8

    def stated(self) -> str:
        return (f"{self.matrix_share:.0%} of {self.flops / 1e12:g} TFLOP/s; {self.bandwidth_share:.0%} of "
                f"{self.memory / 1e12:g} TB/s of memory, {self.nvlink / 1e9:g} GB/s of NVLink and "
                f"{self.network / 1e9:g} GB/s of network a GPU; {self.host / 1e9:g} GB/s to the host's memory")


def link(ranks: tuple[int, ...], rates: Rates) -> str:
    """nvlink if all ranks are on one node, else network."""
    return "nvlink" if len({rank // rates.gpus_per_node for rank in ranks}) == 1 else "network"


def collective_seconds(call: Collective, rates: Rates) -> float:
    """Seconds of one call: a ring moves (n-1)/n of the bytes, an all-reduce twice as much, a message all."""
    size = len(call.ranks)
    if size <= 1 or call.operation == "barrier":
        return 0.0
    over = link(call.ranks, rates)
    speed, latency = rates.nvlink, rates.nvlink_latency
    if over == "network":
        filled = call.ranks[1] - call.ranks[0] == 1  # neighbours: whole nodes, with all of their cards
        cards = min(size, rates.gpus_per_node) if filled else 1
        speed, latency = min(rates.nvlink, rates.network * cards), rates.network_latency
    ring = (size - 1) / size
    moved = call.bytes * (1 if call.operation in POINT_TO_POINT else 2 * ring if call.operation == "all-reduce"
                          else ring)
    return moved / (speed * rates.bandwidth_share) + latency


def operation_seconds(each: Operation, rates: Rates) -> float:
    """Seconds of one call."""
    if each.over_bus:
        return max(each.bytes / rates.host, rates.kernel)
    return max(each.flops / (rates.flops * rates.matrix_share), each.bytes / (rates.memory * rates.bandwidth_share),
               rates.kernel)


def phase_seconds(recorder: Recorder, rates: Rates,
                  free: Callable[[Collective], bool] = lambda _: False) -> dict[str, Counter[str]]:
    """Phase -> seconds of matrix products (`matrix`), of copies from and to the host (`host`), of all other operations
    (`memory`) and of the two links. free: collectives that do not count."""
    found: dict[str, Counter[str]] = {}
    for each, count in recorder.operations.items():
        part = "matrix" if each.flops else "host" if each.over_bus else "memory"
        found.setdefault(each.phase, Counter())[part] += count * operation_seconds(each, rates)
    for call, count in recorder.collectives.items():
        if not free(call):
            found.setdefault(call.phase, Counter())[link(call.ranks, rates)] += count * collective_seconds(call, rates)
    return found
