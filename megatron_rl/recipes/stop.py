"""A polite end: a signal asks the run to save after the step it is in, and to leave with exit code STOPPED.

A scheduler that is about to take the machine away sends such a signal (launch/slurm_job.py); the same command with
run.resume=true then goes on from that step.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

STOPPED = 75
"""Exit code of ranks that saved and left on request (EX_TEMPFAIL of sysexits.h: try again later)."""

_asked = False


def listen(signals: Sequence[signal.Signals] = (signal.SIGUSR1,)) -> None:
    """From here on each of `signals` asks this process's run to stop. Main thread only."""
    for number in signals:
        signal.signal(number, _ask)


def asked() -> bool:
    return _asked


def _ask(*_) -> None:
    global _asked
    _asked = True
