"""Whether a server that answers on its own machine answers here, found out before a run relies on it."""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit

from megatron_rl.launch.keys import status_of

PROOF_S = 15.0
POLL_S = 0.5


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
