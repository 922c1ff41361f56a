"""Where the seconds of a step went, by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """`with timers("generate"): ...` adds wall-clock seconds to a phase until `pop` takes them.

    A phase entered twice in a step adds up; a phase inside another counts in both. GPU work that is still
    queued when a phase ends is charged to the phase that waits for it.
    """

    def __init__(self):
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def seconds(self, phase: str) -> float:
        """Seconds of `phase` so far in this step; 0.0 if it was not entered."""
        return self._seconds.get(phase, 0.0)

    def pop(self) -> dict[str, float]:
        """Seconds per phase since the last pop, named as metrics: {"time/generate": 1.9, ...}."""
        taken = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken
