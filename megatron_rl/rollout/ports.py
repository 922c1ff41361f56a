"""Chooses ports for servers that take long to start."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence

PORTS = range(20000, 32768)
"""Below Linux's ephemeral ports, any of which another program may be given before a slow server binds its own."""
_drawn: set[int] = set()
"""What this process has drawn from PORTS: its servers may not have bound them yet."""


def choose_port(port: int | None, taken: Sequence[int] = (), host: str = "127.0.0.1",
                key: str = "rollout.engine.port", ports: Sequence[int] | None = None) -> int:
    """A free port of `host` that is not in `taken`, or `port` itself. ValueError naming `key` if that one is taken.

    ValueError too if `host` does not lead to this machine.
    ports: those to try, in this order; None for PORTS in an order of chance, and none of them twice.
    """
    if not is_here(host):
        raise ValueError(f"{host} leads to no address of this machine, and {key} is to be a port of it: give a name or "
                         "address that this machine has")
    if port is not None:
        if not _can_bind(host, port):
            raise ValueError(f"{key}={port} is taken on {host}: choose another, or leave it unset "
                             "to have a free one found")
        return port
    for candidate in ports or random.SystemRandom().sample(PORTS, len(PORTS)):
        if candidate not in taken and (ports or candidate not in _drawn) and _can_bind(host, candidate):
            _drawn.add(candidate)
            return candidate
    tried = ports or PORTS
    raise ValueError(f"no port from {min(tried)} to {max(tried)} is free on {host}")


def is_here(host: str) -> bool:
    """Whether the name leads to this machine, which can bind its own addresses alone."""
    return _can_bind(host, 0)


def _can_bind(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
