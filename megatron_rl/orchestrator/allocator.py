"""What the C library does with memory that large answers leave: the process keeps it.

An answer of /generate is copied several times on its way to arrays. By default glibc hands each freed copy back to the
kernel, which clears the pages of the next one. That took a tenth of the orchestrator's processor time, and more under
load.
"""

from __future__ import annotations

import ctypes

MALLOPT = {-3: 256 << 20, -1: 512 << 20, -2: 64 << 20, -8: 1}
"""mallopt(3), in bytes. M_MMAP_THRESHOLD: smaller pieces come from the heap. M_TRIM_THRESHOLD: so much may lie free at
its end. M_TOP_PAD: it grows by so much at a time. M_ARENA_MAX: threads share one, so what one frees another uses."""


def keep_freed_memory() -> None:
    """For the rest of this process. Call it before threads start. Another C library than glibc does as it likes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)
