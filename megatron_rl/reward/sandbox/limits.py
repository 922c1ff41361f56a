"""What one sandboxed run may use, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits", "Outcome", "out_of_memory"]

SLACK_WALL_S = 2.0
OUT_OF_MEMORY = (b"MemoryError", b"std::bad_alloc", b"OutOfMemoryError", b"Cannot allocate memory",
                 b"virtual memory exhausted", b"out of memory", b"Could not reserve enough space")


@dataclass(frozen=True)
class Limits:
    """cpu_s: processor seconds of each process, whole seconds; wall_s: of the run, by default thrice that and 2 s, for
    a machine that does other things too. memory_mb: of all processes of the run together, and of the address space
    of each (address_space=False: not of the latter; a Java machine reserves far more than it uses).
    output_bytes: of standard output; files_mb: of all files that it writes, which lie in memory.
    """

    cpu_s: int = 4
    wall_s: float | None = None
    memory_mb: int = 512
    address_space: bool = True
    output_bytes: int = 1 << 16
    files_mb: int = 64
    processes: int = 64

    @property
    def deadline_s(self) -> float:
        return 3 * self.cpu_s + SLACK_WALL_S if self.wall_s is None else self.wall_s

    def commands(self) -> list[str]:
        """The start of a command line that sets the resource limits (prlimit(1)) and runs the rest of the line."""
        limits = {"cpu": f"{self.cpu_s}:{self.cpu_s + 1}", "nproc": self.processes, "nofile": 128, "core": 0,
                  "fsize": self.files_mb << 20}
        if self.address_space:
            limits["as"] = self.memory_mb << 20
        return ["/usr/bin/prlimit", *(f"--{name}={value}" for name, value in limits.items()), "--"]


@dataclass(frozen=True)
class Outcome:
    """status: ok | compile_error | runtime_error | timeout | memory_limit | output_limit. stderr is cut at 256 KiB."""

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
