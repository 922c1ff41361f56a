"""Keeps local servers running: it starts a server again that died or hangs.

A server that was started again holds the weights it started from, under the label NOTHING_PUBLISHED. It serves no
request until the trainer has published to it (rollout/fleet.py).
"""

from __future__ import annotations

import http.client
import logging
import subprocess
import threading
import time
from collections.abc import Sequence

from megatron_rl.config.rollout import EngineConfig
from megatron_rl.rollout.engines import EngineError, EngineProcess

NOTHING_PUBLISHED, LOADED, EMPTIED = -1, -2, -3
"""Labels of what no trainer published: weights of the start, weights of another folder, none (sync/memory.py)."""
PROBE_TIMEOUT_S = 10.0
FORGIVEN_AFTER_S = 3600.0
"""A server that has answered for so long counts as new: a run may last for weeks."""

_LOG = logging.getLogger(__name__)


class Supervisor:
    """`with Supervisor(processes, config):` starts all servers at once, waits until they answer, watches, stops them.

    EngineError if one cannot be started. If a server later needs more than max_restarts new starts, with less than
    FORGIVEN_AFTER_S of service after each, it is given up with a warning; the others go on.
    """

    def __init__(self, processes: Sequence[EngineProcess], config: EngineConfig):
        self._keepers = [_Keeper(process, config) for process in processes]

    def __enter__(self) -> Supervisor:
        for keeper in self._keepers:
            keeper.start()
        try:
            for keeper in self._keepers:
                keeper.wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    @property
    def restarts(self) -> int:
        return sum(keeper.restarts for keeper in self._keepers)

    def _stop(self) -> None:
        for keeper in self._keepers:
            keeper.stopping.set()
        for keeper in self._keepers:
            keeper.join()


class _Keeper(threading.Thread):
    """One server from start to stop; its parent is this thread, with which the kernel would end it."""

    def __init__(self, process: EngineProcess, config: EngineConfig):
        super().__init__(name=f"engine-{process.port}", daemon=True)
        self.process, self._config = process, config
        self.stopping = threading.Event()
        self.restarts = 0
        self._in_a_row, self._serves_since = 0, 0.0
        self._ready = threading.Event()
        self._failure: BaseException | None = None

    def wait_until_ready(self) -> None:
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def run(self) -> None:
        try:
            self._start()
            self._ready.set()
            while not self.stopping.wait(self._config.health_interval_s):
                why = self._what_is_wrong()
                if why is None:
                    if time.monotonic() - self._serves_since > FORGIVEN_AFTER_S:
                        self._in_a_row = 0
                elif not self._restart(why):
                    return
        except (EngineError, OSError, subprocess.TimeoutExpired) as error:
            self._failure = error
            if self._ready.is_set():
                _LOG.error("the engine on port %d is not watched any more: %s", self.process.port, error)
        finally:
            try:
                self.process.stop()
            finally:
                self._ready.set()

    def _start(self) -> None:
        self.process.start()
        self.process.wait_until_healthy(give_up=self.stopping)
        self._serves_since = time.monotonic()

    def _what_is_wrong(self) -> str | None:
        """Why the server must be started again, or None.

        It waits for hang_timeout_s before it says that the server hangs.
        """
        deadline = time.monotonic() + self._config.hang_timeout_s
        while not self.stopping.is_set():
            if not self.process.alive:
                return "died"
            if self._answers():
                return None
            if time.monotonic() > deadline:
                return f"did not answer for rollout.engine.hang_timeout_s={self._config.hang_timeout_s:g}"
            self.stopping.wait(self._config.health_interval_s)
        return None

    def _answers(self) -> bool:
        """/model_info comes from the HTTP process itself, also while generation is paused (/health does not)."""
        connection = http.client.HTTPConnection(
            self.process.host, self.process.port, timeout=min(PROBE_TIMEOUT_S, self._config.hang_timeout_s))
        try:
            connection.request("GET", "/model_info")
            connection.getresponse()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True

    def _restart(self, why: str) -> bool:
        """False if the server is given up or no longer wanted."""
        while self._in_a_row < self._config.max_restarts and not self.stopping.is_set():
            self.restarts, self._in_a_row = self.restarts + 1, self._in_a_row + 1
            _LOG.warning("the engine on port %d %s: starting it again (%d of rollout.engine.max_restarts=%d)",
                         self.process.port, why, self._in_a_row, self._config.max_restarts)
            self.process.kill()
            try:
                self._start()
            except EngineError as error:
                why = f"could not be started: {error}"
                continue
            return True
        if not self.stopping.is_set():
            _LOG.error("the engine on port %d %s; it is given up, its log is %s", self.process.port, why,
                       self.process.log_path)
        return False
