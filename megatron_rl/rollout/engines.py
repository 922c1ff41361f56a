"""Starts, watches and stops one SGLang server (0.5.23) as a process group of its own."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil

from megatron_rl.config.rollout import ENGINE_KEY, RolloutConfig
from megatron_rl.rollout.die_with_parent import with_parent
from megatron_rl.rollout.engine_command import check_gpus, engine_command
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.scratch import check_tmpdir, make_scratch, shared_memory

LOG_LINES_SHOWN = 25
POLL_S = 0.25
KILL_GRACE_S = 10.0


class EngineError(RuntimeError):
    """The engine could not be started or died; the message ends with the last lines of its log."""


class EngineProcess:
    """One server. `with EngineProcess(argv, env, port=..., log_path=...) as engine:` starts it and waits.

    Start it from a thread that outlives it (the main thread): the kernel kills the server when that thread ends.
    """

    def __init__(
        self, argv: Sequence[str], env: dict[str, str], *, port: int, log_path: str | Path,
        start_timeout_s: float = 240.0, stop_timeout_s: float = 30.0, host: str = "127.0.0.1",
        health_path: str = "/health", hang_timeout_s: float = 30.0,
    ):
        self.argv = tuple(argv)
        self.env = dict(env)
        self.host, self.port, self._health_path = host, port, health_path
        self.log_path = Path(log_path)
        self.start_timeout_s = start_timeout_s
        self.stop_timeout_s = stop_timeout_s
        self.hang_timeout_s = hang_timeout_s
        self._process: subprocess.Popen | None = None
        self._scratch: Path | None = None
        self._shared: set[Path] = set()

    @classmethod
    def from_config(
        cls, rollout: RolloutConfig, model_path: str | Path, *, log_path: str | Path,
        model_dtype: Literal["float32", "bfloat16"] = "float32", seed: int = 0, weight_version: int = 0,
        return_routed_experts: bool = False, taken_ports: Sequence[int] = (), number: int = 0,
        fp32_lm_head: bool = True, adapters: tuple[int, Sequence[str]] | None = None,
    ) -> EngineProcess:
        """A server that is not started yet. taken_ports: ports of other servers that are not started yet.

        number: their count.
        ValueError if rollout.engine.port is taken or there are too few GPUs.
        """
        engine = rollout.engine
        check_gpus(engine, number)
        check_tmpdir()
        port = choose_port(engine.port, taken_ports, engine.host)
        argv, env = engine_command(engine, rollout, model_path, port, model_dtype=model_dtype, seed=seed,
                                   weight_version=weight_version, return_routed_experts=return_routed_experts,
                                   number=number, fp32_lm_head=fp32_lm_head, adapters=adapters)
        return cls(argv, env, port=port, log_path=log_path, start_timeout_s=engine.start_timeout_s,
                   stop_timeout_s=engine.stop_timeout_s, host=engine.host, hang_timeout_s=engine.hang_timeout_s)

    def __enter__(self) -> EngineProcess:
        self.start()
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def alive(self) -> bool:
        process = self._process  # which kill() may take away meanwhile, in another thread
        return process is not None and process.poll() is None

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Returns at once; the server needs some 10 s to answer."""
        assert self._process is None, "the engine has been started already"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = make_scratch()
        # transformers copies the model folder's code there. An engine that read another's unfinished copy would end.
        own = {"TMPDIR": str(self._scratch), "HF_MODULES_CACHE": str(self._scratch / "modules")}
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                with_parent(self.argv), env={**self.env, **own}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)

    def wait_until_healthy(self, give_up: threading.Event | None = None) -> None:
        """Blocks until the server answers /health with 200.

        EngineError if the server dies, if start_timeout_s passes, if it answers and then is silent for hang_timeout_s,
        or if `give_up` is set meanwhile.
        """
        assert self._process is not None, "start() comes first"
        deadline = time.monotonic() + self.start_timeout_s
        answered: float | None = None
        while (status := self._health()) != 200:
            if status is not None:
                answered = time.monotonic()
            if answered is not None and time.monotonic() - answered > self.hang_timeout_s:
                raise EngineError(self._with_log(f"the engine on port {self.port} answered and then did not for "
                                                 f"rollout.engine.hang_timeout_s={self.hang_timeout_s:g}"))
            code = self._process.poll()
            if code is not None:
                raise EngineError(self._with_log(f"the engine on port {self.port} exited with code {code}"))
            if give_up is not None and give_up.is_set():
                raise EngineError(f"the engine on port {self.port} was stopped while it started")
            if time.monotonic() > deadline:
                raise EngineError(self._with_log(
                    f"the engine on port {self.port} did not answer within "
                    f"rollout.engine.start_timeout_s={self.start_timeout_s:g}"))
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL after stop_timeout_s. Returns once no process of the group is left."""
        if self.alive:
            self._shared |= shared_memory(group_members(self._process.pid))
            self._process.send_signal(signal.SIGTERM)  # which looks whether it still runs
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self.stop_timeout_s)
        self.kill()

    def kill(self) -> None:
        """Sends SIGKILL to the whole group. Returns once no process of it is left; start() may follow."""
        if self._process is None:
            return
        group = self._process.pid
        self._shared |= shared_memory(group_members(group))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait(KILL_GRACE_S)
        deadline = time.monotonic() + KILL_GRACE_S
        while members := group_members(group):
            if time.monotonic() > deadline:
                raise EngineError(f"processes {members} of the engine survived SIGKILL")
            time.sleep(0.05)
        self._process = None
        shutil.rmtree(self._scratch, ignore_errors=True)
        while self._shared:
            self._shared.pop().unlink(missing_ok=True)

    def log_tail(self, lines: int = LOG_LINES_SHOWN) -> str:
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _health(self) -> int | None:
        """The HTTP status of /health; None without an answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5.0)
        try:
            connection.request("GET", self._health_path, headers=self._key_header())
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _key_header(self) -> dict[str, str]:
        key = self.env.get(ENGINE_KEY)
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def _with_log(self, message: str) -> str:
        return f"{message}; the end of {self.log_path}:\n{self.log_tail()}"


def group_members(process_group: int) -> list[int]:
    """Process ids of the group that still run; zombies, which hold nothing, do not count."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == process_group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members
