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

LOCK = "run.lock"


@contextlib.contextmanager
def claimed(folder: str | Path, key: str = "run.dir") -> Iterator[None]:
    """ValueError, naming the process, if another one has claimed the folder, on this machine or on one that shares it.

    The kernel gives the claim back when this process ends, however it ends. Folders that were made for the claim and
    stayed empty are removed again. key: what the user set to this folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{key}={folder} is a file: name a folder")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(folder / LOCK, key)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            (folder / LOCK).unlink()
            for each in made:
                each.rmdir()
        file.close()


def _locked(path: Path, key: str) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
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
               "command": " ".join(sys.argv)}, file)
    file.flush()
    return file


def _owner(file: TextIO) -> str:
    file.seek(0)
    try:
        owner = json.load(file)
    except ValueError:  # it has just begun
        return "another process"
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']} ({owner['command']})"
