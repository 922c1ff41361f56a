"""Which machine a server is on, and whether it answers here, found out before a run relies on it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from megatron_rl.config.rollout import is_loopback
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.launch.keys import status_of
from megatron_rl.rollout.ports import is_here

PROOF_S = 15.0
POLL_S = 0.5


def check_tensor(config: Config, is_beside: Callable[[str], bool] = is_here) -> None:
    """ValueError if rollout.publish=tensor would have to reach an engine of rollout.engine.urls on another machine.

    is_beside: whether a host name leads to the machine of rank 0.
    """
    for url in config.rollout.engine.urls:
        host = urlsplit(url).hostname
        require(config.rollout.publish != "tensor" or is_loopback(host) or is_beside(host),
                f"rollout.publish=tensor goes through the memory of one machine, and {url} of rollout.engine.urls "
                "leads to another: choose broadcast or disk")


def why_unreachable(url: str, key: str | None) -> str | None:
    """Why the engine at `url`, which answers on its own machine, does not answer here; None if it does."""
    deadline = time.monotonic() + PROOF_S
    while status_of(url, key) is None:
        if time.monotonic() > deadline:
            host = urlsplit(url).hostname
            try:
                address = socket.gethostbyname(host)
            except OSError:
                address = "unknown"
            return (f"answers at {url} on its own machine, and not from {socket.gethostname()}, where {host} is "
                    f"{address}: check /etc/hosts, routes and firewalls between the two")
        time.sleep(POLL_S)
    return None
