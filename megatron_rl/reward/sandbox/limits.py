"""What one sandboxed run may use, and how it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Limits", "Outcome", "out_of_memory"]

SLACK_WALL_S = 2.0
BUSY_FACTOR = 6
OUT_OF_MEMORY = (b"MemoryError", b"std::bad_alloc", b"OutOfMemoryError", b"Cannot allocate memory",
                 b"virtual memory exhausted", b"out of memory", b"Could not reserve enough space")


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    - cpu_s: processor seconds of all its processes together.
    - wall_s: seconds in which none of its processes has work to do (asleep, waiting); by default three times cpu_s plus
      2 s. A program that waits for a processor of a busy machine is not charged for that.
    - memory_mb: of all processes together, and of the address space of each.
    - address_space: False for programs that reserve far more than they use, such as a Java machine.
    - stack_mb: of the first thread. output_bytes: of standard output.
    - files_mb: of all files that it writes, which lie in memory.
    """

    cpu_s: float = 4.0
    wall_s: float | None = None
    memory_mb: int = 512
    address_space: bool = True
    stack_mb: int = 8
    output_bytes: int = 1 << 16
    files_mb: int = 64
    processes: int = 64

    @property
    def idle_s(self) -> float:
        return 3 * self.cpu_s + SLACK_WALL_S if self.wall_s is None else self.wall_s

    @property
    def end_s(self) -> float:
        """Seconds by the clock after which the run ends, however busy the machine is."""
        return BUSY_FACTOR * self.idle_s

    def commands(self) -> list[str]:
        """The start of a command line that sets the resource limits (prlimit(1)) and runs the rest of the line.

        The kernel counts whole seconds of each process; watch.py keeps the exact limit.
        """
        whole_s = math.ceil(self.cpu_s) + 1
        limits = {"cpu": f"{whole_s}:{whole_s + 1}", "nproc": self.processes, "nofile": 128, "core": 0,
                  "fsize": self.files_mb << 20, "stack": f"{self.stack_mb << 20}:"}
        if self.address_space:
            limits["as"] = self.memory_mb << 20
        return ["/usr/bin/prlimit", *(f"--{name}={value}" for name, value in limits.items()), "--"]


@dataclass(frozen=True)
class Outcome:
    """status: ok | compile_error | runtime_error | timeout | memory_limit | output_limit. stderr: its end."""

    status: str
    stdout: bytes = b""
    stderr: bytes = b""
    seconds: float = 0.0

    @property
    def message(self) -> str:
        """The last line of standard error that says something."""
        lines = [line for line in self.stderr.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else ""


def out_of_memory(stderr: bytes) -> bool:
    """Whether a program that failed says at its end that it had no memory left."""
    return any(sign in stderr[-4096:] for sign in OUT_OF_MEMORY)
