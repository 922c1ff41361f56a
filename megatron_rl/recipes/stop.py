"""A polite end: a signal asks the run to save after the step it is in, and to leave with exit code STOPPED.

A scheduler that is about to take the machine away sends such a signal (launch/slurm_job.py); the same command with
run.resume=true then goes on from that step.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

STOPPED = 75
"""Exit code of ranks that saved and left on request (EX_TEMPFAIL of sysexits.h: try again later)."""

_asked = False


def listen(signals: Sequence[signal.Signals] = (signal.SIGUSR1,)) -> None:
    """From here on each of `signals` asks this process's run to stop. Main thread only."""
    for number in signals:
        signal.signal(number, _ask)


def leave() -> NoReturn:
    """Exit with STOPPED, whatever comes: srun ends the other ranks as soon as one has left, and a SIGTERM that finds
    Python's handlers already gone would end this one with 143."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(STOPPED)


def asked() -> bool:
    return _asked


def _ask(*_) -> None:
    global _asked
    _asked = True
