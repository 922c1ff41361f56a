"""Files that a later start reads: whole or not there, whenever the process is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """The file appears with all of `text`, on the disk, or stays as it was."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, *parts: bytes, allowed: Callable[[], None] = lambda: None) -> None:
    """As write_whole. allowed: called before the file appears; what it raises leaves the file as it was."""
    write_together({path: parts}, allowed=allowed)


def write_together(contents: Mapping[Path, Iterable[bytes]], *, allowed: Callable[[], None] = lambda: None) -> None:
    """As write_bytes for several files, each of parts: none changes before all of them are on the disk."""
    partials = {path: path.with_name(path.name + ".partial") for path in contents}
    for path, parts in contents.items():
        with partials[path].open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
    allowed()  # after the fsync, which takes minutes if a file server is away
    for path, partial in partials.items():
        os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """`value`, indented, through write_whole."""
    write_whole(path, json.dumps(value, indent=2) + "\n")
