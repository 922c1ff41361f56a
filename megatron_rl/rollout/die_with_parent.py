"""Runs a program that the kernel kills when its parent dies: `python die_with_parent.py PARENT_PID PROGRAM ARGS`.

A `kill -9` of the trainer then leaves no engine behind: SGLang's children die with its main process
(sglang.srt.utils.common.kill_itself_when_parent_died). Linux only. "Parent" is the thread that started this
program (prctl(2), PR_SET_PDEATHSIG), so start it from a thread that lives as long as the program should.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
LAUNCHERS = (b"torchrun", b"torch.distributed.run", b"megatron-rl", b"megatron_rl")


def die_with_parent() -> None:
    """From now on the kernel kills this process when its parent ends. This survives exec, but not fork."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def launcher_is_gone() -> bool:
    """Whether the process that started this one ended before die_with_parent() could hear of it.

    An orphan's parent is process 1. In a container torchrun, or our own launcher, may be process 1 itself.
    """
    if os.getppid() != 1:
        return False
    with open("/proc/1/cmdline", "rb") as file:
        command = file.read()
    return not any(launcher in command for launcher in LAUNCHERS)


def with_parent(command: Sequence[str]) -> list[str]:
    """`command`, which the kernel ends when this process ends. Python leaves nothing of itself in it."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def name_process(name: str) -> None:
    """From now on `top` and `ps -o comm` show this process under `name`: ASCII, at most 15 characters."""
    _prctl(PR_SET_NAME, name.encode())


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def main(argv: list[str]) -> None:
    parent_pid, *command = argv
    die_with_parent()
    if os.getppid() != int(parent_pid):
        raise SystemExit(f"the parent died before {command[0]} could start")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
