"""A machine's own name must lead to it from other machines, because others are given the address that it has at home.

gloo tells the other ranks the address of its own host name (gloo/transport/tcp/device.cc: CreateDevice, unless
GLOO_SOCKET_IFNAME is set), and a server that is told to listen at a name listens at what the name means there. Debian's
installer writes `127.0.1.1 NAME` into /etc/hosts: both then serve this machine alone, and the others wait in vain.
"""

from __future__ import annotations

import socket


def check_own_name(name: str | None = None) -> None:
    """ValueError if `name`, this machine's own, does not lead to it from others. None: the one that gloo asks for."""
    name = name or socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise ValueError(f"{name} cannot resolve its own name ({error}): put it into its /etc/hosts or DNS") from error
    if address.startswith("127."):
        raise ValueError(f"{name} is {address} on itself, so no other machine reaches what listens under that name: "
                         f"give {name} its network address in its /etc/hosts (Debian's installer writes the line "
                         f"`127.0.1.1 {name}`)")
