"""Bytes of every live storage by kind, and who made what was alive at the fullest moment.

A storage is counted once, however many views it has, from the operation that returns it until it is freed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass

import torch

ON_HOST = "on the host"
"""The kind of what takes no memory of the device."""


@dataclass(frozen=True, order=True)
class Made:
    """Where a storage comes from: kind, operation, line of code that called it, dtype and shape of its first tensor."""

    kind: str
    operation: str
    where: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Peak:
    """The fullest moment of one phase. tensors: (bytes, count) of all storages that were alive, by where they come
    from."""

    total: int
    tensors: dict[Made, tuple[int, int]]

    @property
    def kinds(self) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for made, (size, _) in self.tensors.items():
            sums[made.kind] += size
        return dict(sums)

    def largest(self, share: float) -> list[tuple[Made, int, int]]:
        """(made, bytes, count) of all that take at least `share` of the total, the largest first."""
        rows = [(made, size, count) for made, (size, count) in self.tensors.items() if size >= share * self.total]
        return sorted(rows, key=lambda row: (-row[1], row[0]))


@dataclass
class _Held:
    size: int
    made: Made
    serial: int
    watch: weakref.ref


class Storages:
    """`total` bytes are alive now. A peak is remembered as a serial number and the storages freed since, so that
    keeping it costs nothing while the total rises."""

    def __init__(self):
        self.total = self.peak = 0
        self._live: dict[int, _Held] = {}
        self._serial = self._peak_serial = 0
        self._freed_since_peak: list[_Held] = []

    def see(self, tensor: torch.Tensor, kind: str, operation: str, where) -> None:
        """Count the tensor's storage unless it is known. where(): called only for a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = 0 if kind == ON_HOST else storage.nbytes()
        self._serial += 1
        made = Made(kind, operation, where(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        self._live[key] = _Held(size, made, self._serial, weakref.ref(storage, lambda _: self._free(key)))
        self.total += size
        if self.total > self.peak:
            self._mark()

    def _free(self, key: int) -> None:
        held = self._live.pop(key)
        self.total -= held.size
        if held.serial <= self._peak_serial:
            self._freed_since_peak.append(held)

    def _mark(self) -> None:
        self.peak, self._peak_serial = self.total, self._serial
        self._freed_since_peak.clear()

    def relabel(self, tensors, kind: str) -> None:
        for tensor in tensors:
            held = self._live.get(tensor.untyped_storage()._cdata)
            if held is not None:
                made = held.made
                held.made = Made(kind, made.operation, made.where, made.dtype, made.shape)

    def on_host(self, tensor: torch.Tensor) -> bool:
        held = self._live.get(tensor.untyped_storage()._cdata)
        return held is not None and held.made.kind == ON_HOST

    def begin(self) -> None:
        """A new phase: the peak is what is alive now."""
        self._mark()

    def at_peak(self) -> Peak:
        return Peak(self.peak, self._counted([held for held in self._live.values() if held.serial <= self._peak_serial]
                                             + self._freed_since_peak))

    def now(self) -> Peak:
        """The same of this moment."""
        return Peak(self.total, self._counted(self._live.values()))

    @staticmethod
    def _counted(storages) -> dict[Made, tuple[int, int]]:
        found: dict[Made, tuple[int, int]] = {}
        for held in storages:
            size, count = found.get(held.made, (0, 0))
            found[held.made] = (size + held.size, count + 1)
        return found
