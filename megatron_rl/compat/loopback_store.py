"""A torch.distributed.TCPStore on a loopback address listens on that address only.

Written for torch 2.14.1, whose server binds all interfaces whatever host it is given
(torch/csrc/distributed/c10d/TCPStoreLibUvBackend.cpp), so that other machines reach the store of a run on one machine.
LoopbackStore hands it a socket that is already bound. Delete when TCPStore binds the host it is given.

`python -m megatron_rl.compat.loopback_store ARGS` is torchrun with such a store.
"""

from __future__ import annotations

import importlib
import runpy
import socket

import torch.distributed


class LoopbackStore(torch.distributed.TCPStore):
    """TCPStore; host_name and the first three options may be given by place, as torch does. port 0: a free one."""

    def __init__(self, host_name: str, port: int = 0, world_size: int | None = None, is_master: bool = False,
                 *rest, **options):
        if is_master and is_loopback(host_name) and options.get("master_listen_fd") is None:
            listening = socket.create_server((host_name, port))
            port = listening.getsockname()[1]
            options["master_listen_fd"] = listening.detach()  # the store closes it
        super().__init__(host_name, port, world_size, is_master, *rest, **options)


def is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


def use_loopback_stores() -> None:
    """From here on torch itself makes its stores this way, in this process and in those that it forks."""
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # the attribute of that name is a function
    torch.distributed.TCPStore = rendezvous.TCPStore = LoopbackStore


if __name__ == "__main__":
    use_loopback_stores()
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=False)
