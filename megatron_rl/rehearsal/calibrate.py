"""The two shares that a card reaches, measured: one rank's update of the first layers, and what its rehearsal counts.

The matrix products' FLOPs over the time of their kernels are a share of the matrix rate; the bytes of all other
operations over the time of theirs are a share of the memory rate. Links and engines are not measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from megatron_rl import topology
from megatron_rl.config.schema import Config, ParallelConfig
from megatron_rl.model.network import Network
from megatron_rl.observe.say import say
from megatron_rl.rehearsal.rates import RatesFile
from megatron_rl.rehearsal.roofline import Rates
from megatron_rl.rehearsal.step import Workload, check_rehearsable, packed, rehearse, run_step
from megatron_rl.rehearsal.summary import summary
from megatron_rl.rehearsal.workload import full_microbatches

LAYERS = 4
PRODUCTS = {"aten.mm", "aten.bmm", "aten.addmm", "aten._grouped_mm",
            *(f"aten.{kind}_attention_{way}" for kind in ("_flash", "_cudnn") for way in ("forward", "backward"))}
"""What runs on a card for what the rehearsal counts FLOPs of: for its stand-ins, and inside torch's varlen_attn."""
TURNS = 3
"""The last of these updates counts: kernels are built and tuned in the first ones."""


class _Storages:
    def relabel(self, tensors: Sequence[torch.Tensor], kind: str) -> None:
        pass


class Stopwatch:
    """What run_step asks of a Recorder; seconds: of the update's kernels, by the operation that started them."""

    def __init__(self, device: torch.device):
        self.storages = _Storages()
        self.seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"

    @contextlib.contextmanager
    def phase(self, name: str, kind: str) -> Iterator[None]:
        if name != "update":
            yield
            return
        on_device = [ProfilerActivity.CUDA] if self._cuda else []
        with profile(activities=[ProfilerActivity.CPU, *on_device]) as seen:
            yield
            if self._cuda:
                torch.cuda.synchronize()
        self.seconds = seconds_of_operations(seen.key_averages(), cuda=self._cuda)


def seconds_of_operations(events: EventList, *, cuda: bool) -> dict[str, float]:
    """Operation -> seconds of its kernels, or without `cuda` its own.

    The profiler lists each kernel a second time under its own name, as an event of the device; that is left out.
    """
    found = {}
    for event in events:
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        if seconds and "::" in event.key and event.device_type == DeviceType.CPU:
            found[event.key.replace("::", ".")] = seconds
    return found


def measured_update(config: Config, network: Network, workload: Workload) -> dict[str, float]:
    """Operation -> seconds of its kernels in one update of one rank, with real tensors, on this machine's device."""
    here = topology.start(config.parallel, seed=0)
    try:
        for _ in range(TURNS):
            watch = Stopwatch(here.device)
            batches = packed(workload, config, here.cp_rank)
            for batch in batches:
                for field in dataclasses.fields(batch):
                    value = vars(batch)[field.name]
                    if isinstance(value, torch.Tensor):
                        setattr(batch, field.name, value.to(here.device))
            run_step(config, network, here, batches, watch)
        return watch.seconds
    finally:
        topology.stop()


def calibrated(rates: RatesFile, card: str, operations: Sequence[Mapping[str, Any]],
               seconds: Mapping[str, float]) -> RatesFile:
    """`rates` with the two shares of `card`. operations: of a summary, all phases. seconds: of measured_update."""
    update = [each for each in operations if each["phase"] == "update"]
    products = {each["name"] for each in update if each["flops"]} | PRODUCTS
    flops = sum(each["flops"] for each in update)
    moved = sum(each["bytes"] for each in update if not each["flops"])
    of_products = sum(value for name, value in seconds.items() if name in products)
    others = sum(value for name, value in seconds.items() if name not in products)
    if not of_products or not others:
        raise ValueError(f"--calibrate: {card} was seen to spend {of_products:g} s in products and {others:g} s in "
                         "other operations; both must take time. Does the profiler see this card?")
    return RatesFile(card, dataclasses.replace(
        rates.ranks, matrix_share=flops / of_products / rates.ranks.flops,
        bandwidth_share=moved / others / rates.ranks.memory), rates.engine,
        ("ranks.matrix_share", "ranks.bandwidth_share"))


def sliced(config: Config, network: Network) -> tuple[Config, Network]:
    """The first layers on one rank."""
    return (dataclasses.replace(config, parallel=ParallelConfig()),
            dataclasses.replace(network, num_hidden_layers=min(LAYERS, network.num_hidden_layers)))


def rehearsed_apart(config: Config, network: Network) -> dict[str, Any]:
    """The summary of rank 0 from a process that sees no GPU, which a rehearsal must not."""
    with (mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}),
          ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool):
        return pool.submit(_rehearsed, config, network).result()


def _rehearsed(config: Config, network: Network) -> dict[str, Any]:
    workload = full_microbatches(config)
    return summary(config, network, workload, rehearse(config, network, 0, workload), Rates())


def calibrate(config: Config, network: Network, rates: RatesFile) -> RatesFile:
    """Measures on the GPU of this machine, with model.backend=auto as it is there. ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("--calibrate measures on a GPU, and this machine has none; --rates FILE reads a file that was "
                         "written on another")
    config, network = sliced(config, network)
    check_rehearsable(config)
    found = rehearsed_apart(config, network)
    card = torch.cuda.get_device_name()
    result = calibrated(rates, card, found["operations"], measured_update(config, network, full_microbatches(config)))
    say(f"{card}: {result.ranks.matrix_share:.0%} of {rates.ranks.flops / 1e12:g} TFLOP/s, "
        f"{result.ranks.bandwidth_share:.0%} of {rates.ranks.memory / 1e12:g} TB/s")
    return result
