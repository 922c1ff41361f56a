"""Everything that one rank does, as a dispatch mode sees it: operations, collectives, storages, reads by the host.

The mode goes around a FakeTensorMode (a rehearsal) or around real tensors (to check rehearsals against).
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork, ProcessGroup, Work
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_rl.rehearsal.flops import operation_flops
from megatron_rl.rehearsal.storages import ON_HOST, Peak, Storages

aten = torch.ops.aten
READ = aten._local_scalar_dense.default
NO_TRAFFIC = {aten.detach.default, aten.alias.default, aten.empty.memory_format, aten.empty_strided.default,
              aten.new_empty.default, aten.empty_like.default, aten.new_empty_strided.default,
              aten._unsafe_view.default}
"""Operations that move no bytes besides the views."""
COPIES = {aten._to_copy, aten.copy_}
SHAPED_LIKE = {aten.new_zeros, aten.new_ones, aten.new_full, aten.zeros_like, aten.ones_like, aten.full_like,
               aten.rand_like, aten.randn_like, aten.zero_, aten.fill_}
"""They write, and read nothing."""
PICKED = {aten.gather, aten.index_select, aten.index, aten.embedding}
"""They read as much of their first argument as they give."""
ADDED_TO = {aten.scatter_add_, aten.index_add_, aten.index_add, aten.scatter_add, aten.index_put_, aten.index_copy,
            aten.scatter, aten.scatter_}
"""They read and write as much of their first argument as the source holds, after a copy if not in place."""
COLLECTIVES = {"_allgather_base_": "all-gather", "allgather_": "all-gather",
               "allgather_into_tensor_coalesced_": "all-gather",
               "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
               "reduce_scatter_tensor_coalesced_": "reduce-scatter", "allreduce_": "all-reduce",
               "allreduce_coalesced_": "all-reduce", "alltoall_base_": "all-to-all", "alltoall_": "all-to-all",
               "broadcast_": "broadcast", "send": "send", "recv_": "recv", "barrier": "barrier"}
WHOLE = {"_reduce_scatter_base_": 1, "reduce_scatter_tensor_coalesced_": 1, "reduce_scatter_": 1, "alltoall_base_": 1,
         "alltoall_": 1}
"""Which argument holds what the group exchanges, where it is not the first."""
PASSED_BY = ("/contextlib.py", "/typing_extensions.py", "/compat/megatron_cpu.py")
"""Files of wrappers, which say nothing of who called."""
POINT_TO_POINT = ("send", "recv")
_PACKAGE = str(Path(__file__).parent)
_ROOT = str(Path(__file__).parents[2]) + "/"


@dataclass(frozen=True, order=True)
class Collective:
    """One kind of call. ranks: those of the group, of a message the two ends. where: the line that asked for it.

    bytes: of the whole buffer: what an all-gather gives, what a reduce-scatter takes, what a message holds.
    """

    phase: str
    operation: str
    ranks: tuple[int, ...]
    bytes: int
    where: str


@dataclass(frozen=True, order=True)
class Operation:
    """One kind of call. bytes: of all inputs and outputs, as an unfused kernel reads and writes them. over_bus: a copy
    between the device and the host's memory, and bytes what it brings."""

    phase: str
    name: str
    flops: int
    bytes: int
    over_bus: bool = False


@dataclass(frozen=True)
class Receipt:
    """The first use of what a rank received: from here on it has waited. index: counts its receives from `peer` in
    this phase."""

    phase: str
    peer: int
    index: int


@dataclass(frozen=True)
class Wait:
    """The rank goes on when a collective has come to its end. index: counts the collectives of this phase that are no
    messages. A collective that nobody started ahead is waited for at once."""

    phase: str
    index: int


class _Handle(Work):
    """What a rehearsed collective gives its caller to wait by."""

    def __init__(self, waited: Callable[[], None]):
        super().__init__()
        self._waited = waited

    def wait(self, timeout=None) -> bool:
        self._waited()
        return True


class Recorder(TorchDispatchMode):
    """operations, collectives and host_reads count calls; peaks has the fullest moment of each phase.

    events: what happened in order. Megatron asks for messages ahead of their use, so a receive stands there as the
    Receipt of its first use. Where a collective was waited for is known on fake tensors alone.

    fake: the mode that this one goes around; None if tensors are real. From a fake tensor the host reads 1, or False.
    """

    def __init__(self, fake: FakeTensorMode | None = None):
        super().__init__()
        self._fake = fake
        self.storages = Storages()
        self.operations: Counter[Operation] = Counter()
        self.collectives: Counter[Collective] = Counter()
        self.host_reads: Counter[tuple[str, str]] = Counter()  # (phase, where)
        self.events: list[Operation | Collective | Receipt | Wait] = []  # in order; equal ones are one object
        self._expected: dict[int, Receipt] = {}  # by the storage that a message comes to
        self._received: Counter[tuple[str, int]] = Counter()  # by phase and peer
        self._started: Counter[str] = Counter()  # by phase
        self._handles: list[_Handle] = []  # whoever waits holds them by C++ alone
        self._known: dict[Operation | Collective, Operation | Collective] = {}
        self.peaks: dict[str, Peak] = {}
        self.curve: list[tuple[int, str, int]] = []  # (operations so far, phase, bytes), at changes of 1% of the peak
        self._count = 0
        self._last_read: tuple[str, int, int] | None = None
        self._phase = self._kind = "before"

    @contextlib.contextmanager
    def phase(self, name: str, kind: str) -> Iterator[None]:
        """What happens inside belongs to `name`; storages made inside are of `kind`."""
        before = self._phase, self._kind
        self._phase, self._kind = name, kind
        self.storages.begin()
        try:
            yield
        finally:
            self.peaks[name] = self.storages.at_peak()
            self._phase, self._kind = before

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Storages made inside lie in host memory."""
        before, self._kind = self._kind, ON_HOST
        try:
            yield
        finally:
            self._kind = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._expected:
            self._use(tree_iter((args, kwargs)))
        if func is READ:
            return self._read(func, args, kwargs)
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        out = func(*args, **kwargs)
        outs = [value for value in tree_iter(out) if isinstance(value, torch.Tensor)]
        name = str(func._overloadpacket)
        for tensor in outs:
            self.storages.see(tensor, self._kind, name, where)
        if func.is_view or func.namespace == "prim":
            return out
        size = flops = 0
        if func not in NO_TRAFFIC:
            size = _moved(func, args, kwargs, outs)
            flops = operation_flops(func, args, kwargs, out)
        over_bus = func._overloadpacket in COPIES and any(
            self.storages.on_host(value) for value in tree_iter((args, out)) if isinstance(value, torch.Tensor))
        if over_bus:
            size = sum(map(_present, outs))
        self._happened(Operation(self._phase, name, flops, size, over_bus), self.operations)
        self._advance()
        return out

    def _happened(self, event, counts: Counter) -> None:
        counts[event] += 1
        self.events.append(self._known.setdefault(event, event))

    def _use(self, values) -> None:
        for value in values:
            if isinstance(value, torch.Tensor) and (
                    receipt := self._expected.pop(value.untyped_storage()._cdata, None)) is not None:
                self.events.append(receipt)

    def _advance(self) -> None:
        self._count += 1
        total = self.storages.total
        if not self.curve or abs(total - self.curve[-1][2]) >= 0.01 * self.storages.peak \
                or self.curve[-1][1] != self._phase:
            self.curve.append((self._count, self._phase, total))

    def _read(self, func, args, kwargs):
        tensor = args[0]
        if isinstance(tensor, FakeTensor):
            if tensor.constant is not None:
                return func(*args, **kwargs)
            read = where(), tensor.untyped_storage()._cdata, self._count
            if read != self._last_read:  # the next number of the same tolist(), which waits once
                self.read_by_host(read[0])
            self._last_read = read
            return False if tensor.dtype is torch.bool else 1.0 if tensor.dtype.is_floating_point else 1
        self.read_by_host(where())
        return func(*args, **kwargs)

    def read_by_host(self, line: str) -> None:
        self.host_reads[self._phase, line] += 1

    def _collective(self, func, args, kwargs):
        name = str(func._overloadpacket).split(".")[-1]
        if self._fake is not None and "coalesced" in name:
            out = FakeWork().boxed()  # these have no fake kernel (torch 2.14.1)
        else:
            out = func(*args, **kwargs)
        if name not in COLLECTIVES:
            raise NotImplementedError(f"a recorder does not know the collective {name}, called at {where()}")
        size = sum(_bytes(value) for value in tree_iter(args[WHOLE.get(name, 0)]) if isinstance(value, torch.Tensor))
        group = next(value for value in args if isinstance(value, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(ProcessGroup.unbox(group)))
        if COLLECTIVES[name] in POINT_TO_POINT:  # Megatron sends over the world's group if there are two stages
            ranks = tuple(sorted((dist.get_rank(), ranks[args[2]])))
        call = Collective(self._phase, COLLECTIVES[name], ranks, size, where())
        if call.operation == "recv":
            self.collectives[call] += 1
            peer = next(rank for rank in ranks if rank != dist.get_rank())
            receipt = Receipt(self._phase, peer, self._received[self._phase, peer])
            self._expected |= {value.untyped_storage()._cdata: receipt for value in tree_iter(args[0])}
            self._received[self._phase, peer] += 1
        else:
            self._happened(call, self.collectives)
            if self._fake is not None and call.operation not in POINT_TO_POINT:
                out = self._waited_for(out)
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.storages.see(value, self._kind, name, where)
        self._advance()
        return out


    def _waited_for(self, out):
        """What the collective returned, with a handle that tells of the wait."""
        wait = Wait(self._phase, self._started[self._phase])
        self._started[self._phase] += 1
        self._handles.append(_Handle(lambda: self.events.append(wait)))
        boxed = self._handles[-1].boxed()
        return (*out[:-1], boxed) if isinstance(out, tuple) else boxed


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _moved(func, args, kwargs, outs: list[torch.Tensor]) -> int:
    """Bytes that one kernel reads and writes; of an expanded tensor, those that are there."""
    read = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
    size = sum(map(_present, read)) + sum(map(_present, outs))
    packet = func._overloadpacket
    if packet in SHAPED_LIKE:
        return sum(map(_present, outs))
    if packet in PICKED:
        return size - _present(read[0]) + _present(outs[0])
    if packet in ADDED_TO:
        whole, added = _present(read[0]), min(_bytes(read[0]), _bytes(read[-1]))
        return size - 2 * whole + 2 * added + (0 if func._schema.is_mutable else 2 * whole)
    if func._schema.is_mutable and not outs:  # in place, and nothing given back: written too
        return size + sum(_present(value) for given, argument in zip(args, func._schema.arguments, strict=False)
                          if argument.alias_info is not None and argument.alias_info.is_write
                          for value in tree_iter(given) if isinstance(value, torch.Tensor))
    return size


def _present(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in memory: a dimension of stride 0 is there once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride or not length else 1
    return elements * tensor.element_size()


_NAMES: dict[object, str | None] = {}


def where() -> str:
    """file.py:line (function) of the innermost frame that is neither torch's nor the recorder's."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code not in _NAMES:
            _NAMES[code] = _name(code.co_filename)
        if _NAMES[code] is not None:
            return f"{_NAMES[code]}:{frame.f_lineno} ({code.co_name})"
        frame = frame.f_back
    return "?"


def _name(path: str) -> str | None:
    if path.startswith((_PACKAGE, "<")) or "/torch/" in path or path.endswith(PASSED_BY):
        return None
    return path.split("/site-packages/")[-1].removeprefix(_ROOT)
