"""A rank's requests to the orchestrator: commands and outcomes are JSON, shards and states are bodies.

If the orchestrator dies, the launcher starts it again. Until it answers, every call is tried again, for at most
orchestrator.wait_timeout_s.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
from typing import Any

from megatron_rl.config.orchestrator import RUN_KEY, OrchestratorConfig
from megatron_rl.handoff import UpdateShard, read_shard
from megatron_rl.observe.wires import keep_alive
from megatron_rl.topology import Topology

POLL_TIMEOUT_S = 30.0  # the orchestrator answers a poll within handoff.protocol.POLL_S
BODY_TIMEOUT_S = 600.0
RETRY_S = 0.2
HEARTBEAT_S = 5.0
CUT_OFF = 68
"""Exit code of a rank whose machine was cut off; EX_NOHOST of sysexits.h."""


class OrchestratorLost(RuntimeError):
    """The orchestrator has not answered for orchestrator.wait_timeout_s."""


class OrchestratorClient:
    """Blocking requests to one address under the run's key; no proxy of the environment is used."""

    def __init__(self, options: OrchestratorConfig):
        if options.port is None:
            raise ValueError("orchestrator.port is not set: ranks are started by `megatron-rl rl`, which sets it")
        self._host, self._port, self._wait_s = options.host, options.port, options.wait_timeout_s
        self._headers = {"Authorization": f"Bearer {os.environ[RUN_KEY]}", "Content-Type": "application/json"}
        self._answered_at = time.monotonic()
        self.no_way_since: float | None = None
        """Since when its machine has been out of reach; None while something there answers, be it with a refusal."""

    def try_once(self, method: str, path: str, value: Any = None, *, timeout_s: float) -> tuple[int, bytes] | None:
        """(status, body), or None without an answer. OrchestratorLost if there has been none for wait_timeout_s."""
        body = None if value is None else json.dumps(value).encode()
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            self._connect(connection)
            connection.request(method, path, body, self._headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() - self._answered_at > self._wait_s:
                raise OrchestratorLost(
                    f"the orchestrator at {self._host}:{self._port} has not answered for orchestrator.wait_timeout_s="
                    f"{self._wait_s:g} ({type(error).__name__}: {error}); see orchestrator.log") from error
            return None
        finally:
            connection.close()
        self._answered_at = time.monotonic()
        return answer.status, content

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        """Opens the connection. It breaks if the machine at the other end vanishes: see observe/wires.py."""
        try:
            connection.connect()
        except OSError as error:
            if isinstance(error, ConnectionRefusedError):
                self.no_way_since = None
            else:
                self.no_way_since = self.no_way_since or time.monotonic()
            raise
        self.no_way_since = None
        keep_alive(connection.sock)

    def request(self, method: str, path: str, value: Any = None) -> bytes:
        """The body of the answer. RuntimeError if the orchestrator refuses the request."""
        self._answered_at = time.monotonic()  # it may have been silent because nothing was asked
        while (answer := self.try_once(method, path, value, timeout_s=BODY_TIMEOUT_S)) is None or answer[0] == 503:
            time.sleep(RETRY_S)
        status, content = answer
        if status != 200:
            raise RuntimeError(f"{method} {path}: the orchestrator answered {status}: {content[:600].decode()}")
        return content


class Link:
    """One rank's link to the orchestrator. Rank 0 asks for commands; a replica's first rank pulls for all of it."""

    def __init__(self, options: OrchestratorConfig, here: Topology):
        self._client, self._here, self._number = OrchestratorClient(options), here, 0

    def next(self) -> dict[str, Any]:
        """Collective: the next command. At every poll rank 0 tells the waiting ranks, so none of them times out."""
        while True:
            command = self._here.broadcast_object(self._poll() if self._here.is_main else None)
            if command is not None:
                return command

    def _poll(self) -> dict[str, Any] | None:
        answer = self._client.try_once("GET", f"/command/{self._number}", timeout_s=POLL_TIMEOUT_S)
        if answer is None or answer[0] in (204, 503):
            time.sleep(RETRY_S if answer is None else 0.0)
            return None
        if answer[0] != 200:
            raise RuntimeError(f"the orchestrator answered {answer[0]}: {answer[1][:600].decode()}")
        return json.loads(answer[1])

    def done(self, outcome: dict[str, Any]) -> None:
        """Rank 0 reports the outcome of the command; the next command may follow."""
        if self._here.is_main:
            self._client.request("POST", f"/done/{self._number}", outcome)
        self._number += 1

    def shard(self, step: int) -> list[UpdateShard]:
        """Collective: what this rank's replica trains on in `step`."""
        here, body = self._here, None
        if here.rank == here.replica_firsts[here.dp_rank]:
            body = self._client.request("GET", f"/step/{step}/shard/{here.dp_rank}")
        return read_shard(here.share_with_replica(body))

    def state(self, step: int) -> bytes:
        """The orchestrator's state after `step` steps, for the checkpoint. Rank 0 only."""
        return self._client.request("GET", f"/state/{step}")


class Heartbeat(threading.Thread):
    """Reports every few seconds that this rank lives. A rank that is stopped, or whose node is gone, falls silent.

    doing: what the rank reports that it does. If the orchestrator does not answer, this thread ignores it, since the
    orchestrator may be started again. If its machine is out of reach for hang_timeout_s, this thread ends the process,
    because the main thread may wait for other ranks in vain: the orchestrator has given this rank up by then. That
    holds for every wait_timeout_s, after which rank 0 ends the run.
    """

    def __init__(self, options: OrchestratorConfig, rank: int):
        super().__init__(name="heartbeat", daemon=True)
        self._client, self._options = OrchestratorClient(options), options
        self._path, self.doing, self._over = f"/heartbeat/{rank}", "waits for a command", threading.Event()

    def run(self) -> None:
        about = {"host": os.uname().nodename, "pid": os.getpid()}
        while True:
            try:
                heard = self._client.try_once("POST", self._path, {**about, "doing": self.doing}, timeout_s=HEARTBEAT_S)
            except OrchestratorLost:  # rank 0 says so, if it is not cut off from this rank
                heard = None
            since, limit_s = self._client.no_way_since, self._options.hang_timeout_s
            if since is not None and time.monotonic() - since > limit_s:
                print(f"megatron-rl: {about['host']} has had no way to {self._options.host}, the machine of the "
                      f"orchestrator, for orchestrator.hang_timeout_s={limit_s:g}: this rank ends", file=sys.stderr,
                      flush=True)
                os._exit(CUT_OFF)
            if self._over.wait(RETRY_S if heard is None else HEARTBEAT_S):
                return

    def stop(self) -> None:
        self._over.set()
