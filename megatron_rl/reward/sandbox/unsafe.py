"""Runs programs as they are, for users who ask for that: with limits on resources and without any isolation."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from megatron_rl.reward.sandbox.box import ENVIRONMENT, Running
from megatron_rl.reward.sandbox.limits import Limits, Outcome

__all__ = ["Unsafe"]

PROCESSES = 4096  # counted with all others of this user


class Unsafe:
    """Bubblewrap's interface without isolation.

    /box and /tmp in the command line become a folder, which is removed after.
    """

    def check(self) -> None:
        """It runs everywhere."""

    def run(self, argv: Sequence[str], files: Mapping[str, bytes], *, stdin: bytes = b"", limits: Limits) -> Outcome:
        with tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            with self.start(argv, files, stdin=given.fileno(), limits=limits) as running:
                return running.outcome()

    @contextmanager
    def start(self, argv: Sequence[str], files: Mapping[str, bytes], *, stdin: int, limits: Limits,
              stdout: int = subprocess.PIPE) -> Iterator[Running]:
        # A process that the program left behind may still write there. That is no failure of the scorer.
        with tempfile.TemporaryDirectory(prefix="megatron_rl-unsafe-", ignore_cleanup_errors=True) as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
                Path(folder, name).chmod(0o755)
            own = (word.replace("/tmp/", f"{folder}/").replace("/box/", f"{folder}/") for word in argv)
            line = [*replace(limits, processes=PROCESSES).commands(), *own]
            process = subprocess.Popen(line, env=ENVIRONMENT, cwd=folder, stdin=stdin, stdout=stdout, bufsize=0,
                                       stderr=subprocess.PIPE, start_new_session=True)
            ended = os.pidfd_open(process.pid)
            try:
                yield Running(process, ended, limits)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                os.close(ended)
                for stream in (process.stdout, process.stderr):
                    if stream is not None:
                        stream.close()
