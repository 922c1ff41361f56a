"""What requests to servers that judge have in common: which failures may pass, and the pauses between attempts."""

from __future__ import annotations

import http.client
import time
import urllib.error
from collections.abc import Iterator

__all__ = ["FAILURES", "attempts", "failure_of"]

FIRST_PAUSE_S = 0.2
MAY_PASS = (408, 409, 425, 429)
FAILURES = (OSError, ValueError, OverflowError, RecursionError, http.client.HTTPException)
"""What a request raises if the server, or the way to it, failed, or if the answer is none that was asked for."""


def attempts(retries: int) -> Iterator[int]:
    """0 .. retries, with growing pauses between them."""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        yield attempt


def failure_of(error: Exception) -> tuple[str, bool]:
    """(what one of FAILURES says, whether another attempt may help: the server is busy, unreachable or faulty)."""
    if isinstance(error, urllib.error.HTTPError):
        try:
            said = error.read1(200)  # what has come by now
        except FAILURES:  # the body stalls, or is cut
            said = b""
        return f"HTTP {error.code}: {said.decode(errors='replace')}", error.code >= 500 or error.code in MAY_PASS
    return f"{type(error).__name__}: {error}", True
