"""Reads what a running sandbox writes, and kills it if it passes a limit that the kernel does not enforce."""

from __future__ import annotations

import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megatron_rl.reward.sandbox.limits import Limits, Outcome, out_of_memory

__all__ = ["kill", "watch"]

SAMPLE_S = 0.03
GRACE_S = 10.0  # between the kill and the end
MISSED_S = 0.1
STDERR_BYTES = 1 << 16
STDERR_FLOOD_BYTES = 64 << 20
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MAX_FILES = 20_000
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
KILLED_BY_CPU_LIMIT = 128 + 24  # SIGXCPU
KILLED = 128 + 9


class _Stream:
    """What a pipe brought: standard output up to its cap, of standard error the end."""

    def __init__(self, cap: int, keep: int | None = None):
        self.data, self.total, self.cap, self.keep = bytearray(), 0, cap, keep

    def read(self, descriptor: int) -> int:
        """1: something was there; 0: the stream has ended; -1: nothing is there yet. Never holds much."""
        try:
            piece = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return -1
        self.total += len(piece)
        if self.keep is None:
            self.data += piece[:max(0, self.cap - len(self.data))]
        else:
            self.data = (self.data + piece)[-self.keep:]
        return int(bool(piece))

    @property
    def flooded(self) -> bool:
        return self.total > self.cap


def watch(process: subprocess.Popen[bytes], ended: int, limits: Limits, beside: int | None = None) -> Outcome:
    """Waits for the end of the run, at which the descriptor `ended` becomes readable.

    process.stdout may be None if its output goes elsewhere. Memory and processor time are sampled from outside every 30
    ms, because the kernel's limits bind each process by itself. beside: a process that this run works with; while that
    one has work to do, this one may wait.
    """
    started = time.monotonic()
    output = {"stdout": _Stream(limits.output_bytes), "stderr": _Stream(STDERR_FLOOD_BYTES, STDERR_BYTES)}
    meter, broken = _Meter(process.pid, beside, limits), ""
    with selectors.DefaultSelector() as selector:
        selector.register(ended, selectors.EVENT_READ, "ended")
        for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                selector.register(stream.fileno(), selectors.EVENT_READ, name)
        alive, sample_at = True, started + SAMPLE_S
        while alive and time.monotonic() < started + limits.end_s + GRACE_S:
            for key, _ in selector.select(max(0.0, sample_at - time.monotonic())):
                if key.data == "ended":
                    alive = False
                elif not output[key.data].read(key.fd):
                    selector.unregister(key.fd)
            broken = broken or _flood(output)
            if time.monotonic() >= sample_at and not broken:
                broken = meter.sample()
                sample_at = time.monotonic() + SAMPLE_S
            if broken:
                kill(process, ended)
        for key in list(selector.get_map().values()):
            if key.data != "ended":
                while not _flood(output) and output[key.data].read(key.fd) == 1:
                    pass
    code, seconds = process.wait(), time.monotonic() - started
    stdout, stderr = (bytes(stream.data) for stream in output.values())
    status = broken or _flood(output) or _status(code, stderr, seconds, limits)
    return Outcome(status, stdout, stderr, seconds)


def kill(process: subprocess.Popen[bytes], ended: int) -> None:
    """Kills a run by its process group, which holds bwrap's outer process and its first inner one.

    While bwrap sets up the isolation, the inner process does not yet end with the outer one. Does nothing if the run
    has ended.
    """
    if not select.select([ended], [], [], 0.0)[0]:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _flood(output: dict[str, _Stream]) -> str:
    return "output_limit" if any(stream.flooded for stream in output.values()) else ""


class _Meter:
    """Adds up what a run uses, from samples of /proc."""

    def __init__(self, pid: int, beside: int | None, limits: Limits):
        self._pid, self._beside, self._limits = pid, beside, limits
        self._started = self._last = time.monotonic()
        self._idle_s = 0.0
        self._ticks: dict[int, int] = {}
        """Processor time of each process ever seen; one whose parent does not wait for it is counted nowhere else."""

    def sample(self) -> str:
        """The limit that the run has passed by now, as a status; empty if none."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, MISSED_S), now  # the time that we did not get is not the run's
        processes = list(_descendants(self._pid))
        alive = 0
        for pid in processes:
            own, children = _ticks(pid)
            self._ticks[pid] = max(own, self._ticks.get(pid, 0))
            alive += own + children
        if not any(map(_has_work, processes)) and (
                self._beside is None or not any(map(_has_work, _descendants(self._beside)))):
            self._idle_s += passed
        cpu_s = max(alive, sum(self._ticks.values())) / TICKS_PER_S
        if (cpu_s > self._limits.cpu_s or self._idle_s > self._limits.idle_s
                or now - self._started > self._limits.end_s):
            return "timeout"
        if sum(map(_private_pages, processes)) * PAGE_BYTES > self._limits.memory_mb << 20:
            return "memory_limit"
        # an empty file costs a kilobyte that no limit counts; the last descendant is the deepest, inside the sandbox
        return "memory_limit" if processes and _files(processes[-1]) > MAX_FILES else ""


def _stat(path: str) -> list[str]:
    """The fields of a stat file (proc(5)) from the state on; none if the process has ended."""
    try:
        return Path(path).read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _ticks(pid: int) -> tuple[int, int]:
    """Processor time of a process and of those of its children that it has waited for."""
    fields = _stat(f"/proc/{pid}/stat")
    return (int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])) if fields else (0, 0)


def _has_work(pid: int) -> bool:
    """Whether one of its threads runs, could run, or waits for a disk."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return any(_stat(f"/proc/{pid}/task/{thread}/stat")[:1] in (["R"], ["D"]) for thread in threads)


def _descendants(pid: int) -> Iterator[int]:
    waiting = [pid]
    while waiting:
        parent = waiting.pop(0)
        yield parent
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                waiting += map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())
        except OSError:  # it has ended meanwhile
            continue


def _private_pages(pid: int) -> int:
    """Resident pages that are not of a file (proc(5), statm)."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(resident) - int(shared)


def _files(pid: int) -> int:
    """Files under the process's own /tmp; 0 while that is still, or is, the one that everybody has.

    Both looks are at one open folder: while bwrap changes the root, the same path may lead to the host's files.
    """
    try:
        own = os.open(f"/proc/{pid}/root/tmp", os.O_PATH)
    except OSError:
        return 0
    try:
        if os.fstat(own).st_dev == os.stat("/tmp").st_dev:
            return 0
        space = os.fstatvfs(own)
    finally:
        os.close(own)
    return space.f_files - space.f_ffree


def _status(code: int, stderr: bytes, seconds: float, limits: Limits) -> str:
    if code == 0:
        return "ok"
    if code == KILLED_BY_CPU_LIMIT or code == -24 or (code in (KILLED, -9) and seconds >= limits.cpu_s):
        return "timeout"
    return "memory_limit" if out_of_memory(stderr) else "runtime_error"
