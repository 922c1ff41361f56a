"""A scheduler that asks a run to stop signals every process of the job; the orchestrator alone decides on it.

It saves after the step that it is in and ends the run; the same command with run.resume=true goes on from that step.
Ranks, and what they start, have to stay until then.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
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


_asked = False


def listen(signals: Sequence[signal.Signals] = (signal.SIGUSR1,)) -> None:
    """From here on each of `signals` asks this process's run to stop. Main thread only."""
    for number in signals:
        signal.signal(number, _ask)


def ignore(signals: Sequence[signal.Signals]) -> None:
    """From here on this process goes on in spite of `signals`."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def stop_asked() -> bool:
    return _asked


def _ask(*_) -> None:
    global _asked
    _asked = True
