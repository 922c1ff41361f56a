"""Temporary folders of the processes of a run, removed with them; sockets in them must fit the kernel's limit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PREFIX = "rl-"
LONGEST_PATH = 107
"""Bytes of a socket's path (unix(7): sun_path has 108 with the zero at its end)."""
INSIDE = "/rl-12345678/torch-shm-dir-123456/manager.sock"
"""The longest path in TMPDIR of a socket that a run makes: torch's, of shared memory."""
LONGEST_TMPDIR = LONGEST_PATH - len(INSIDE)


def check_tmpdir() -> None:
    """ValueError if sockets in TMPDIR would have longer paths than the kernel takes."""
    folder = tempfile.gettempdir()
    length = len(os.fsencode(folder))
    if length > LONGEST_TMPDIR:
        raise ValueError(f"TMPDIR={folder} has {length} bytes; a run makes sockets in it, whose paths may have "
                         f"{LONGEST_PATH}: set TMPDIR to a folder of at most {LONGEST_TMPDIR} bytes")


def make_scratch() -> Path:
    """A new folder in TMPDIR that only this user may read; the caller removes it. ValueError as check_tmpdir."""
    check_tmpdir()
    return Path(tempfile.mkdtemp(prefix=PREFIX))


def shared_memory(pids: list[int]) -> set[Path]:
    """What these processes have open of SGLang's own shared memory, which it leaves behind when it is killed
    (sglang 0.5.23, managers/load_snapshot.py)."""
    found = set()
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/maps").read_text()
        except OSError:  # it has ended
            continue
        found |= {Path(line[line.index("/dev/shm/"):]) for line in text.splitlines() if "/dev/shm/sglang_" in line}
    return found
