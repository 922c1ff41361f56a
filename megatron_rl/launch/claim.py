"""One process at a time works in a run's folder; another is told which one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_rl.observe import lease
from megatron_rl.observe.say import say

LOCK = "run.lock"
TAKE_OVER_S = 60.0
"""How long a start waits for an older start of its job. Programs of that one look at the lease far more often."""
TAKE_OVER_POLL_S = 0.5


@contextlib.contextmanager
def claimed(folder: str | Path, key: str = "run.dir", *, job: str | None = None) -> Iterator[None]:
    """ValueError, naming the process, if another one has claimed the folder, on this machine or on one that shares it.

    The kernel gives the claim back when this process ends, however it ends. Folders that were made for the claim and
    stayed empty are removed again. key: what the user set to this folder. job: the cluster's job that this process is
    the newest start of. From an older start of the same job, which its cluster has lost, it takes the folder away.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{key}={folder} is a file: name a folder")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    file = _locked(folder / LOCK, key, job)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):  # not a newer start's
                (folder / LOCK).unlink()
            for each in made:
                each.rmdir()
        file.close()


def _locked(path: Path, key: str, job: str | None) -> TextIO:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # its last owner ended in between, and took along the folder that it had made
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                if job is not None and _about(file).get("job") == job:
                    _take_over(file, path)
                    continue
                raise ValueError(f"{key}={path.parent} is in use by {_owner(file)}: wait until it has ended, stop it, "
                                 f"or choose another {key}") from None
        except OSError as error:
            file.close()
            raise ValueError(f"{key}={path.parent}: its file system takes no locks ({error.strerror}), so two runs "
                             "could write there: choose a folder on one that does") from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its owner ended in between and took the file along
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T"),
               "command": " ".join(sys.argv), "job": job}, file)
    file.flush()
    return file


def _take_over(file: TextIO, path: Path) -> None:
    """Returns once the older start has ended. One that does not answer for TAKE_OVER_S keeps a lock that is gone."""
    lease.take(path.parent)
    say(f"an older start of this job still holds {path.parent} ({_owner(file)}): it is told to end")
    deadline = time.monotonic() + TAKE_OVER_S
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(TAKE_OVER_POLL_S)
    say(f"it has not ended within {TAKE_OVER_S:g} s; it writes nothing once it can see {path.parent} again")
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _owner(file: TextIO) -> str:
    owner = _about(file)
    if not owner:  # it has just begun
        return "another process"
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']} ({owner['command']})"


def _about(file: TextIO) -> dict:
    file.seek(0)
    try:
        return json.load(file)
    except ValueError:
        return {}
