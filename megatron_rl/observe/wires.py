"""Connections that notice when the machine at the other end is gone, in seconds instead of in minutes or never."""

from __future__ import annotations

import socket

IDLE_S, EVERY_S, PROBES = 10, 5, 4
"""A silent connection is asked after IDLE_S, then every EVERY_S; it breaks after PROBES questions without an answer."""


def keep_alive(connection: socket.socket) -> None:
    """From now on the kernel breaks this TCP connection about IDLE_S + EVERY_S * PROBES after its cable was cut.

    That also holds for data that were sent and never acknowledged (tcp(7): TCP_USER_TIMEOUT). A program at the other
    end that is slow to answer, or stopped, breaks nothing: its kernel answers. One that leaves more unread for so long
    than the two kernels' buffers hold does break it (Linux, tcp_timer.c: tcp_probe_timer); our requests fit into them.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, EVERY_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (IDLE_S + EVERY_S * PROBES))
