"""Reads what a running sandbox writes, and kills it when it passes a limit that the kernel does not keep for us."""

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
STDERR_BYTES = 1 << 18
MAX_FILES = 20_000
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
KILLED_BY_CPU_LIMIT = 128 + 24  # SIGXCPU
KILLED = 128 + 9


def watch(process: subprocess.Popen[bytes], ended: int, limits: Limits) -> Outcome:
    """Waits for the end of the run, which is when the descriptor `ended` becomes readable.

    process.stdout may be None: its output goes elsewhere. Memory is sampled from outside every 30 ms, because
    RLIMIT_AS binds each process by itself.
    """
    started = time.monotonic()
    output = {"stdout": bytearray(), "stderr": bytearray()}
    caps = {"stdout": limits.output_bytes, "stderr": STDERR_BYTES}
    broken = ""
    with selectors.DefaultSelector() as selector:
        selector.register(ended, selectors.EVENT_READ, "ended")
        for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                selector.register(stream.fileno(), selectors.EVENT_READ, name)
        alive, sample_at = True, started + SAMPLE_S
        while alive and time.monotonic() < started + limits.deadline_s + GRACE_S:
            for key, _ in selector.select(max(0.0, sample_at - time.monotonic())):
                if key.data == "ended":
                    alive = False
                elif not _read(key.fd, output[key.data], caps[key.data]):
                    selector.unregister(key.fd)
            broken = broken or _flood(output, caps)
            if time.monotonic() >= sample_at and not broken:
                broken = _beyond(process.pid, limits, time.monotonic() - started)
                sample_at = time.monotonic() + SAMPLE_S
            if broken:
                kill(process, ended)
        for key in list(selector.get_map().values()):
            if key.data != "ended":
                while not _flood(output, caps) and _read(key.fd, output[key.data], caps[key.data]) == 1:
                    pass
    code, seconds = process.wait(), time.monotonic() - started
    status = broken or _flood(output, caps) or _status(code, bytes(output["stderr"]), seconds, limits)
    stdout, stderr = (bytes(output[name][:cap]) for name, cap in caps.items())
    return Outcome(status, stdout, stderr, seconds)


def kill(process: subprocess.Popen[bytes], ended: int) -> None:
    """Kills a run by its process group, in which bwrap's process outside is and its first one inside.

    While bwrap still puts its walls up, the one inside does not yet go with the one outside. Nothing is done once the
    run has ended.
    """
    if not select.select([ended], [], [], 0.0)[0]:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _read(descriptor: int, into: bytearray, cap: int) -> int:
    """1: something was there; 0: the stream has ended; -1: nothing is there yet. Never holds much more than `cap`."""
    try:
        piece = os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return -1
    into += piece[:max(0, cap + 1 - len(into))]
    return int(bool(piece))


def _flood(output: dict[str, bytearray], caps: dict[str, int]) -> str:
    return "output_limit" if any(len(output[name]) > cap for name, cap in caps.items()) else ""


def _beyond(pid: int, limits: Limits, seconds: float) -> str:
    """The limit that the run has passed by now, as a status; empty if none."""
    if seconds > limits.deadline_s:
        return "timeout"
    pages, processes = 0, list(_descendants(pid))
    for process in processes:
        pages += _private_pages(process)
    if pages * PAGE_BYTES > limits.memory_mb << 20:
        return "memory_limit"
    # an empty file costs a kilobyte that no limit counts; the last descendant is the deepest, inside the sandbox
    return "memory_limit" if processes and _files(processes[-1]) > MAX_FILES else ""


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
    """Files under the process's own /tmp; 0 while that is still, or is, the one that everybody has."""
    own = f"/proc/{pid}/root/tmp"
    try:
        if os.stat(own).st_dev == os.stat("/tmp").st_dev:
            return 0
        space = os.statvfs(own)
    except OSError:
        return 0
    return space.f_files - space.f_ffree


def _status(code: int, stderr: bytes, seconds: float, limits: Limits) -> str:
    if code == 0:
        return "ok"
    if code == KILLED_BY_CPU_LIMIT or code == -24 or (code in (KILLED, -9) and seconds >= limits.cpu_s):
        return "timeout"
    return "memory_limit" if out_of_memory(stderr) else "runtime_error"
