"""Which start of a run may write into its folder: the newest. <run.dir>/lease.json holds its number and its key.

A cluster may start a run again although the first start still works: its node lost the controller, but not the file
system. The new start then takes the next number and draws a key. Programs of older starts look at the lease every
CHECK_S, and before they make a checkpoint the newest one; if it holds another key than theirs, they end at once and
write nothing more. The number is for people: it begins again if run.dir is removed. No clock is compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from megatron_rl.observe.files import write_json

LEASE = "lease.json"
START_NUMBER = "MEGATRON_RL_START_NUMBER"
"""The environment variable that holds "NUMBER KEY FOLDER" of a start: the programs of the start inherit it."""
CHECK_S = 2.0
UNREAD_S = 5.0
"""How long `check` tries to read a lease. The first try may fail because another machine just replaces it (NFS)."""
EXIT_CODE = 76  # beside 75 of launch/programs.py; EX_PROTOCOL of sysexits.h


class Superseded(OSError):
    """Another start of the run has taken its folder; the message names it."""


def take(run_dir: str | Path, *, over: bool = False) -> int:
    """Makes this process and those that it starts the newest start of the run; older ones will end. Its number.

    over: nothing is started. Programs of this process's own start that still wait on other machines end.
    """
    path, number, key = Path(run_dir) / LEASE, 1, secrets.token_hex(8)
    with contextlib.suppress(OSError, ValueError):  # none yet, or one that nobody can read
        number = _read(path)["number"] + 1
    write_json(path, {"number": number, "key": key, "host": socket.gethostname(), "pid": os.getpid(),
                      "since": time.strftime("%F %T"), "over": over})
    os.environ[START_NUMBER] = f"{number} {key} {path.parent.absolute()}"
    return number


def superseded(run_dir: str | Path) -> str | None:
    """Who has taken the folder after our start; None if nobody has, or if the lease cannot be read now.

    Programs that no start has numbered may write.
    """
    with contextlib.suppress(OSError, ValueError):  # the file system is away; it may come back
        return _superseded(run_dir)
    return None


def check(run_dir: str | Path) -> None:
    """Superseded if a newer start has taken the folder. OSError if that cannot be found out within UNREAD_S."""
    deadline = time.monotonic() + UNREAD_S
    while True:
        try:
            why = _superseded(run_dir)
            break
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise OSError(f"{Path(run_dir) / LEASE} cannot be read ({error}), and a newer start of the run may "
                              f"have taken run.dir={run_dir}: this one writes nothing there") from error
        time.sleep(0.2)
    if why is not None:
        raise Superseded(why)


def _superseded(run_dir: str | Path) -> str | None:
    """As `superseded`; OSError or ValueError if the lease cannot be read."""
    ours, _, rest = os.environ.get(START_NUMBER, "").partition(" ")
    key, _, folder = rest.partition(" ")
    if not folder or not _same(folder, run_dir):
        return None
    lease = _read(Path(run_dir) / LEASE)
    if lease["key"] == key:
        return None
    if lease["over"]:
        return f"the run in run.dir={run_dir} was ended on {lease['host']} at {lease['since']}: this process ends too"
    return (f"start {lease['number']} of the run, on {lease['host']} since {lease['since']}, has taken "
            f"run.dir={run_dir}: start {ours} ends here and writes nothing more")


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


def _same(folder: str, run_dir: str | Path) -> bool:
    """Whether the two are one folder, which a machine may reach through another link than the one that took it."""
    if folder == str(Path(run_dir).absolute()):
        return True
    with contextlib.suppress(OSError):
        return os.path.samefile(folder, run_dir)
    return False


def _read(path: Path) -> dict:
    return json.loads(path.read_text())
