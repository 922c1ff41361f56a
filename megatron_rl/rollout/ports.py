"""Chooses ports for servers that take long to start."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Sequence

PORTS = range(20000, 32768)
"""Below Linux's ephemeral ports, any of which another program may be given before a slow server binds its own."""
SHARES = 800
"""A process draws port p only if it holds the mark of share p % SHARES, so two processes never draw the same port.

Shares are strided, because some servers also take the port after their own.
"""
MARK = "\0megatron_rl.ports."
"""How names of marks begin. Marks are abstract sockets on which nobody listens: they belong to a network namespace, as
ports do, and end with their process."""
_drawn: set[int] = set()
"""What this process has drawn from PORTS: its servers may not have bound them yet."""
_marks: dict[int, socket.socket] = {}
os.register_at_fork(after_in_child=lambda: _marks.clear())


def choose_port(port: int | None, taken: Sequence[int] = (), host: str = "127.0.0.1",
                key: str = "rollout.engine.port", ports: Sequence[int] | None = None) -> int:
    """A free port of `host` that is not in `taken`, or `port` itself. ValueError naming `key` if that one is taken.

    ValueError too if `host` does not lead to this machine.
    ports: those to try, in this order; None for PORTS in an order of chance, and none of them twice, be it by this
    process or while another one lives that has drawn it.
    """
    if not is_here(host):
        raise ValueError(f"{host} leads to no address of this machine, and {key} is to be a port of it: give a name or "
                         "address that this machine has")
    if port is not None:
        if not _can_bind(host, port):
            raise ValueError(f"{key}={port} is taken on {host}: choose another, or leave it unset "
                             "to have a free one found")
        return port
    for candidate in ports or _in_an_order_of_chance():
        if candidate not in taken and (ports or _may_draw(candidate)) and _can_bind(host, candidate):
            _drawn.add(candidate)
            return candidate
    tried = ports or PORTS
    raise ValueError(f"no port from {min(tried)} to {max(tried)} is free on {host}")


def is_here(host: str) -> bool:
    """Whether the name leads to this machine, which can bind its own addresses alone."""
    return _can_bind(host, 0)


def _in_an_order_of_chance() -> list[int]:
    """PORTS; those of the shares that this process holds come first, so that it takes few from others."""
    order = random.SystemRandom().sample(PORTS, len(PORTS))
    return sorted(order, key=lambda port: port % SHARES not in _marks)


def _may_draw(port: int) -> bool:
    return port not in _drawn and (port % SHARES in _marks or _mark(port % SHARES))


def _mark(share: int) -> bool:
    """Marks the share as this process's own. False if it is another's."""
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        mark.bind(f"{MARK}{share}")
    except OSError as error:
        mark.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    _marks[share] = mark
    return True


def _can_bind(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
