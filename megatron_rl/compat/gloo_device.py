"""All gloo groups of a process share one device, and so one polling thread.

Written for torch 2.14.1, which makes a device for each group. The device's thread wakes up a hundred times a second
even if nobody communicates (gloo/transport/tcp/loop.cc: Loop::run), and Megatron makes about thirty groups in every
rank. Delete when torch shares the device (torch/csrc/distributed/c10d/init.cpp: the constructor of ProcessGroupGloo).
"""

from __future__ import annotations

import datetime
import functools
import os
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d

if torch.distributed.is_gloo_available():
    from torch.distributed import ProcessGroupGloo

    class OneDeviceGloo(ProcessGroupGloo):
        """ProcessGroupGloo as torch.distributed makes it, on this process's device."""

        def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta, **options: bool):
            settings = ProcessGroupGloo._Options()
            interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
            settings._devices = [_device(os.getpid(), interface) for interface in interfaces]
            settings._timeout = timeout
            for name, value in options.items():
                setattr(settings, name, value)
            super().__init__(store, rank, size, settings)


@functools.cache
def _device(process: int, interface: str) -> Any:
    """process: this process's number; a forked process needs a device of its own. interface: "" is the default."""
    return (ProcessGroupGloo.create_device(interface=interface) if interface
            else ProcessGroupGloo.create_default_device())


def share_gloo_device() -> None:
    """Groups made from here on, in this process and in those that it forks, share a device. Without gloo: nothing."""
    if torch.distributed.is_gloo_available():
        distributed_c10d.ProcessGroupGloo = OneDeviceGloo
