"""Watches what interpreted kernels read and write: what a GPU would answer with an illegal access or a race.

The interpreter runs programs one after the other on numpy, so a read past a tensor's end gives whatever lies there and
of two programs that write one element the later wins; on a GPU neither is sure. Written for triton 3.8
(runtime/interpreter.py: GridExecutor.__call__, InterpreterBuilder.create_masked_load and _store).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, _get_np_dtype


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """From its first element to its last; the gaps that strides leave are inside."""
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    elements = 1 + last if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


@contextmanager
def watched(reachable: Iterable[torch.Tensor] = ()):
    """AssertionError in here when a kernel touches an address outside its arguments and `reachable`, or writes one
    address twice in a launch. Yields the list of launched kernels' names."""
    launched: list[str] = []
    spans: list[tuple[int, int]] = []
    written: list[np.ndarray] = []
    launch, load, store = GridExecutor.__call__, InterpreterBuilder.create_masked_load, \
        InterpreterBuilder.create_masked_store

    def touched(pointers, mask) -> np.ndarray:
        addresses = pointers.data[mask.data.astype(bool)].astype(np.int64).ravel()
        size = np.dtype(_get_np_dtype(pointers.get_element_ty())).itemsize
        inside = np.zeros(len(addresses), bool)
        for first, end in spans:
            inside |= (addresses >= first) & (addresses + size <= end)
        assert inside.all(), f"{launched[-1]} touches memory that is not its own, at {int((~inside).sum())} places"
        return addresses

    def watch_launch(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
        spans[:] = [span(tensor) for tensor in (*tensors, *reachable)]
        written.clear()
        launch(self, *args, **kwargs)
        addresses = np.concatenate([np.empty(0, np.int64), *written])
        assert len(np.unique(addresses)) == len(addresses), f"{launched[-1]} writes an element twice"

    def watch_load(self, pointers, mask, *rest):
        touched(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watch_store(self, pointers, value, mask, *rest):
        written.append(touched(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    with patch.object(GridExecutor, "__call__", watch_launch), \
            patch.object(InterpreterBuilder, "create_masked_load", watch_load), \
            patch.object(InterpreterBuilder, "create_masked_store", watch_store):
        yield launched
