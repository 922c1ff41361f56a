"""Where the seconds of a step went, by phase."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PHASE = "phase.json"
"""In a run directory: what the step that is under way does, for the progress display."""


class Timers:
    """`with timers("generate"): ...` adds wall-clock seconds to a phase until `pop` takes them.

    A phase entered twice in a step adds up; a phase inside another counts in both. GPU work that is still
    queued when a phase ends is charged to the phase that waits for it. on_phase: told of each phase that begins.
    """

    def __init__(self, on_phase: Callable[[str], None] | None = None):
        self._seconds: dict[str, float] = {}
        self._on_phase = on_phase

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        if self._on_phase is not None:
            self._on_phase(phase)
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def seconds(self, phase: str) -> float:
        """Seconds of `phase` so far in this step; 0.0 if it was not entered."""
        return self._seconds.get(phase, 0.0)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Seconds that another process popped."""
        for name, value in seconds.items():
            phase = name.removeprefix("time/")
            self._seconds[phase] = self._seconds.get(phase, 0.0) + value

    def pop(self) -> dict[str, float]:
        """Seconds per phase since the last pop, named as metrics: {"time/generate": 1.9, ...}."""
        taken = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


class PhaseFile:
    """<run.dir>/phase.json: the phase that began last, and when."""

    def __init__(self, directory: Path | str):
        self._path = Path(directory) / PHASE
        # Orchestrator and trainer both write, at the same time if the orchestrator was started again during a step.
        self._partial = self._path.with_name(f"{PHASE}.{secrets.token_hex(4)}.partial")

    def write(self, phase: str) -> None:
        """For another process to read; replaced at once, and not worth an fsync."""
        self._partial.write_text(json.dumps({"phase": phase, "since": time.time()}), encoding="utf-8")
        os.replace(self._partial, self._path)

    def read(self) -> tuple[str, float] | None:
        """(phase, seconds since it began), None before the first."""
        try:
            told = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return told["phase"], max(0.0, time.time() - told["since"])

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
