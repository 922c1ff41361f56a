"""Which start of a run may write into its folder: the newest. <run.dir>/lease.json holds its number.

A cluster may start a run again although the first start still works: its node lost the controller, but not the file
system. The new start then takes the next number. Programs of older starts look at the number every CHECK_S, and before
they make a checkpoint the newest one; if it is higher than their own, they end at once and write nothing more.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from megatron_rl.observe.files import write_json

LEASE = "lease.json"
START_NUMBER = "MEGATRON_RL_START_NUMBER"
"""The environment variable that holds "NUMBER FOLDER" of a start: the programs of the start inherit it."""
CHECK_S = 2.0
EXIT_CODE = 76  # beside 75 of launch/programs.py; EX_PROTOCOL of sysexits.h


class Superseded(OSError):
    """Another start of the run has taken its folder; the message names it."""


def take(run_dir: str | Path, *, over: bool = False) -> int:
    """Makes this process and those that it starts the newest start of the run; older ones will end. Its number.

    over: nothing is started. Programs of this process's own start that still wait on other machines end.
    """
    path = Path(run_dir) / LEASE
    number = _read(path).get("number", 0) + 1
    write_json(path, {"number": number, "host": socket.gethostname(), "pid": os.getpid(),
                      "since": time.strftime("%F %T"), "over": over})
    os.environ[START_NUMBER] = f"{number} {path.parent.absolute()}"
    return number


def superseded(run_dir: str | Path) -> str | None:
    """Who has taken the folder after our start, or None. Programs that no start has numbered may write."""
    ours, _, folder = os.environ.get(START_NUMBER, "").partition(" ")
    if folder != str(Path(run_dir).absolute()):
        return None
    lease = _read(Path(run_dir) / LEASE)
    if lease.get("number", 0) <= int(ours):
        return None
    if lease["over"]:
        return f"the run in run.dir={run_dir} was ended on {lease['host']} at {lease['since']}: this process ends too"
    return (f"start {lease['number']} of the run, on {lease['host']} since {lease['since']}, has taken "
            f"run.dir={run_dir}: start {ours} ends here and writes nothing more")


def check(run_dir: str | Path) -> None:
    """Superseded if a newer start has taken the folder."""
    if (why := superseded(run_dir)) is not None:
        raise Superseded(why)


class Watch(threading.Thread):
    """Ends this process, whatever it is doing, when a newer start has taken the folder."""

    def __init__(self, run_dir: str | Path):
        super().__init__(name="lease", daemon=True)
        self._run_dir = run_dir

    def run(self) -> None:
        while (why := superseded(self._run_dir)) is None:
            time.sleep(CHECK_S)
        print(f"megatron-rl: {why}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):  # none yet, or another machine replaces it, or the file system is away
        return {}
