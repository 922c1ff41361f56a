"""Our kernels on one GPU against lower bounds: forward and backward at Ling-lite's sizes, bfloat16.

A floor is the larger of two times, operations over the matrix rate and bytes over the memory's bandwidth, both from
NVIDIA's data sheet of the H100 SXM. The READMEs in kernels/rl_kernels derive operations and bytes. `ratio` is time over
floor; on another GPU it compares with the H100's floor. `--quick` runs the same calls at tiny sizes, on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import Row, interleaved, main, median
from rl_kernels.grouped_experts import grouped_experts
from rl_kernels.linear_logprob import linear_logprob
from rl_kernels.router_topk import router_topk

MATRIX_RATE, BANDWIDTH = 989e12, 3.35e12
BYTES = 2
HIDDEN, VOCAB, EXPERTS, TOP, WIDTH = 2048, 126_464, 64, 6, 1408
TINY = {"HIDDEN": 32, "VOCAB": 256, "EXPERTS": 4, "TOP": 2, "WIDTH": 16}


@dataclass(frozen=True)
class Case:
    """One operation at one size. make(device): the tensors; call(tensors, impl): forward and backward."""

    name: str
    operations: float
    bytes: float
    implementations: tuple[str, ...]
    make: Callable[[torch.device], tuple[torch.Tensor, ...]]
    call: Callable[[tuple[torch.Tensor, ...], str], Any]

    @property
    def floor_s(self) -> float:
        return max(self.operations / MATRIX_RATE, self.bytes / BANDWIDTH)


def drawn(device: torch.device, *shape: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[-1] ** 0.5
    return values.to(device, torch.bfloat16).requires_grad_()


def logprob_case(tokens: int, hidden: int, vocab: int) -> Case:
    def make(device):
        return drawn(device, tokens, hidden), drawn(device, vocab, hidden), torch.arange(tokens, device=device) % vocab

    def call(tensors, impl):
        logprobs_T, entropy_T = linear_logprob(*tensors, impl=impl)
        (logprobs_T.sum() + 0.1 * entropy_T.sum()).backward()

    return Case(f"linear_logprob with entropy: {tokens} tokens, V {vocab}", 12 * tokens * vocab * hidden,
                4 * vocab * hidden * BYTES + 4 * tokens * hidden * BYTES + 20 * tokens * vocab,
                ("fused", "triton", "chunked"), make, call)


def experts_case(tokens: int, hidden: int, experts: int, top: int, width: int) -> Case:
    def make(device):
        first = torch.arange(tokens * top, device=device).view(tokens, top)
        weights_TK = torch.full((tokens, top), 1 / top, device=device, requires_grad=True)
        return (drawn(device, tokens, hidden), drawn(device, experts, 2 * width, hidden),
                drawn(device, experts, hidden, width), first % experts, weights_TK)

    def call(tensors, impl):
        grouped_experts(*tensors, impl=impl).sum().backward()

    rows = tokens * top
    return Case(f"grouped_experts: {tokens} tokens, top {top} of {experts}", 18 * rows * hidden * width,
                9 * experts * hidden * width * BYTES + rows * (8 * hidden + 12 * width) * BYTES,
                ("grouped_mm", "triton", "loop"), make, call)


def router_case(tokens: int, hidden: int, experts: int, top: int) -> Case:
    def make(device):
        return drawn(device, tokens, hidden), drawn(device, experts, hidden)

    def call(tensors, impl):
        routed = router_topk(*tensors, top, impl=impl)
        (routed.weights_TK.sum() + routed.z_sum + routed.prob_sums_E.sum()).backward()

    return Case(f"router_topk: {tokens} tokens, E {experts}", 6 * tokens * hidden * experts,
                3 * tokens * hidden * BYTES + 16 * tokens * experts, ("triton", "reference"), make, call)


def cases(*, quick: bool) -> list[Case]:
    if quick:
        hidden, vocab, experts, top, width = TINY.values()
        few, many = 16, 32
    else:
        hidden, vocab, experts, top, width = HIDDEN, VOCAB, EXPERTS, TOP, WIDTH
        few, many = 8_192, 32_768
    return [logprob_case(few, hidden, vocab), experts_case(few, hidden, experts, top, width),
            experts_case(many, hidden, experts, top, width), router_case(many, hidden, experts, top)]


def seconds_of(case: Case, device: torch.device, *, calls: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of one call by implementation. Several are started before the host waits, so that it is not timed."""
    tensors = case.make(device)

    def run(impl: str) -> None:
        for _ in range(calls):
            for tensor in tensors:
                tensor.grad = None
            case.call(tensors, impl)
        if device.type == "cuda":
            torch.cuda.synchronize()

    taken = interleaved({impl: lambda impl=impl: run(impl) for impl in case.implementations}, repeats=repeats)
    return {impl: [seconds / calls for seconds in each] for impl, each in taken.items()}


def measure(*, quick: bool, repeats: int, calls: int) -> tuple[list[Row], dict[str, Any]]:
    if not quick and not torch.cuda.is_available():
        raise SystemExit("the kernels' floors are a GPU's: a CUDA device is needed, and torch sees none; --quick runs "
                         "without")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    repeats, calls = (1, 1) if quick else (repeats, calls)
    started, rows, seconds = time.perf_counter(), [], {}
    for case in cases(quick=quick):
        seconds[case.name] = seconds_of(case, device, calls=calls, repeats=repeats)
        rows += [Row(f"{impl}, {case.name}", 1e3 * median(taken), 1e3 * case.floor_s, "ms")
                 for impl, taken in seconds[case.name].items()]
    return rows, {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "seconds": seconds,
                  "took_s": time.perf_counter() - started}


if __name__ == "__main__":
    main("floors", measure, repeats=5, calls=10)
