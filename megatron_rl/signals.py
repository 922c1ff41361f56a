"""A scheduler that asks a run to stop signals every process of the job; some have to stay until the run has saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


@contextmanager
def stop_unheard() -> Iterator[None]:
    """A process that this thread starts inside, and what that one starts, does not hear STOP_SIGNALS."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
