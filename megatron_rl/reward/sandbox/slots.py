"""Leases a user id to each sandbox that runs at the same time.

The limit on processes counts by user id and does not bind root. If two sandboxes shared an id, a fork bomb in one would
keep the other from forking.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["leased_uid"]

FIRST_UID = 60000  # Debian's range for ids that no account has by default (base-passwd, 60000 to 64999)
SLOTS = 1000


@contextmanager
def leased_uid() -> Iterator[int | None]:
    """A user id that no other sandbox on this machine has until the end of the block; None if we are not root.

    Without root we cannot change our id. From Linux 5.14 on, processes are counted by user namespace too, and each
    sandbox has its own. The lease is a file lock, so it ends with the process, whatever happens to it.
    """
    if os.geteuid() != 0:
        yield None
        return
    descriptor, uid = _lock(_folder())
    try:
        yield uid
    finally:
        os.close(descriptor)


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / "megatron_rl-sandbox-slots"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != 0:
        raise RuntimeError(f"{folder} belongs to another user: remove it, or set TMPDIR to another folder")
    return folder


def _lock(folder: Path) -> tuple[int, int]:
    for step in range(SLOTS):
        uid = FIRST_UID + (os.getpid() + step) % SLOTS
        descriptor = os.open(folder / str(uid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor, uid
        except BlockingIOError:
            os.close(descriptor)
    raise RuntimeError(f"{SLOTS} sandboxes are running on this machine already")
