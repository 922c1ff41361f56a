"""Starts, watches and stops one SGLang server (0.5.23) as a process group of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch

import megatron_rl
from megatron_rl.config.rollout import ENGINE_KEY, EngineConfig, RolloutConfig, is_loopback

PORTS = range(20000, 32768)
"""Below Linux's ephemeral ports, any of which another program may be given before a slow server binds its own."""
LOG_LINES_SHOWN = 25
POLL_S = 0.25
KILL_GRACE_S = 10.0
# torchrun's variables would make the engine join the trainer's store instead of opening its own
# (torch.distributed.rendezvous._torchelastic_use_agent_store).
TRAINER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
                     "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")


class EngineError(RuntimeError):
    """The engine could not be started or died; the message ends with the last lines of its log."""


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def choose_port(port: int | None, taken: Sequence[int] = (), host: str = "127.0.0.1") -> int:
    """A free port of `host` that is none of `taken`, or `port` itself. Raises ValueError when `port` is taken."""
    if port is not None:
        if not _can_bind(host, port):
            raise ValueError(f"rollout.engine.port={port} is taken on {host}: choose another, or leave it unset "
                             "to have a free one found")
        return port
    for candidate in random.SystemRandom().sample(PORTS, len(PORTS)):
        if candidate not in taken and _can_bind(host, candidate):
            return candidate
    raise ValueError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on {host}")


def _can_bind(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def engine_command(
    engine: EngineConfig, rollout: RolloutConfig, model_path: str | Path, port: int, *,
    model_dtype: Literal["float32", "bfloat16"] = "float32", seed: int = 0, weight_version: int = 0,
    return_routed_experts: bool = False, number: int = 0,
) -> tuple[list[str], dict[str, str]]:
    """The command line and the whole environment of the server. number: of this server on its machine, from 0.

    `engine.dtype` overrides `model_dtype`. `seed` seeds SGLang's own sampler, which is reproducible only for
    the same arrival order of requests; `engine.deterministic` makes it a function of each request's seed.
    return_routed_experts: keep the experts that tokens take, for requests that ask for them.
    """
    device = resolve_device(engine.device)
    environment = _engine_environment(engine, device)
    if ENGINE_KEY in environment:
        module = "megatron_rl.compat.sglang_key"
    else:
        module = "megatron_rl.compat.sglang_cpu" if device == "cpu" else "sglang.launch_server"
    # One request at a time: on CPU the last bits of a matmul depend on how many rows it has. On CUDA SGLang's
    # own batch-invariant kernels make that unnecessary.
    alone = engine.deterministic and device == "cpu"
    flags = {
        "--model-path": str(model_path),
        "--host": engine.host,
        "--port": port,
        "--device": device,
        "--dtype": engine.dtype or model_dtype,
        "--context-length": rollout.max_context_tokens,
        "--max-running-requests": 1 if alone else engine.max_running_requests,
        "--mem-fraction-static": engine.mem_fraction_static,
        "--random-seed": seed,
        "--weight-version": weight_version,
        "--log-level-http": "warning",
    }
    switches = ["--trust-remote-code", "--sleep-on-idle"]
    if engine.max_total_tokens is not None:
        flags["--max-total-tokens"] = engine.max_total_tokens
    if engine.deterministic:
        switches.append("--enable-deterministic-inference")
    if return_routed_experts:
        switches.append("--enable-return-routed-experts")
    if alone:
        # Whole prompts. -1 means that too, but RoutedExpertsCapturer (sglang 0.5.23) takes it for a buffer's length.
        flags["--chunked-prefill-size"] = rollout.max_context_tokens
        switches.append("--disable-radix-cache")
    if device == "cpu":
        flags |= {"--attention-backend": "torch_native", "--sampling-backend": "pytorch"}
        switches.append("--disable-overlap-schedule")
    else:
        flags |= {"--tp-size": engine.tp, "--base-gpu-id": engine.first_gpu + number * engine.tp}
        if engine.colocate:
            switches.append("--enable-memory-saver")
    argv = [sys.executable, "-m", module]
    for name, value in flags.items():
        argv += [name, str(value)]
    return [*argv, *switches, *engine.extra_args], environment


def engine_key(engine: EngineConfig) -> str | None:
    """What the engines' requests carry, or None. ValueError when the variable that should hold it is not set."""
    if engine.api_key_env is None:
        return None
    key = os.environ.get(engine.api_key_env)
    if not key:
        raise ValueError(f"rollout.engine.api_key_env={engine.api_key_env}: that environment variable is not set")
    return key


def with_key(engine: EngineConfig) -> EngineConfig:
    """Engines that we start on another host than loopback ask for a key: one drawn for this run if none was given.

    It is put into this process's environment, from which engines and ranks inherit it.
    """
    if engine.api_key_env is not None or is_loopback(engine.host):
        return engine
    os.environ.setdefault(ENGINE_KEY, secrets.token_hex(32))
    return dataclasses.replace(engine, api_key_env=ENGINE_KEY)


def _check_gpus(engine: EngineConfig, number: int) -> None:
    needed, found = engine.first_gpu + (number + 1) * engine.tp, torch.cuda.device_count()
    if engine.tp > 1 and resolve_device(engine.device) == "cpu":
        raise ValueError(f"rollout.engine.tp={engine.tp} shares a model among GPUs, and this machine has none: "
                         "leave it at 1")
    if resolve_device(engine.device) == "cuda" and needed > found:
        raise ValueError(f"rollout.engine.count={engine.count} engines of rollout.engine.tp={engine.tp} GPUs from "
                         f"rollout.engine.first_gpu={engine.first_gpu} on need {needed} GPUs, this machine has {found}")


def _engine_environment(engine: EngineConfig, device: str) -> dict[str, str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in (*TRAINER_VARIABLES, ENGINE_KEY) and not name.startswith("TORCHELASTIC_")
    }
    key = engine_key(engine)
    if key is not None:
        environment[ENGINE_KEY] = key
    source_root = str(Path(megatron_rl.__path__[0]).resolve().parent)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = source_root if inherited is None else source_root + os.pathsep + inherited
    environment["HF_HUB_OFFLINE"] = "1"
    environment["OMP_NUM_THREADS"] = str(engine.threads)
    if device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch uses huge pages: a bucket's memory is there sooner
    return environment


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

    @classmethod
    def from_config(
        cls, rollout: RolloutConfig, model_path: str | Path, *, log_path: str | Path,
        model_dtype: Literal["float32", "bfloat16"] = "float32", seed: int = 0, weight_version: int = 0,
        return_routed_experts: bool = False, taken_ports: Sequence[int] = (), number: int = 0,
    ) -> EngineProcess:
        """Not yet started. taken_ports: of servers that have not been started yet either; number: how many they are.

        Raises ValueError when rollout.engine.port is taken or there are too few GPUs.
        """
        engine = rollout.engine
        _check_gpus(engine, number)
        port = choose_port(engine.port, taken_ports, engine.host)
        argv, env = engine_command(engine, rollout, model_path, port, model_dtype=model_dtype, seed=seed,
                                   weight_version=weight_version, return_routed_experts=return_routed_experts,
                                   number=number)
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
        guard = [sys.executable, "-m", "megatron_rl.rollout.die_with_parent", str(os.getpid())]
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [*guard, *self.argv], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )

    def wait_until_healthy(self, give_up: threading.Event | None = None) -> None:
        """Blocks until its health is answered with 200.

        Raises EngineError if the server dies, start_timeout_s passes, it answers and then stops to for hang_timeout_s,
        or `give_up` is set meanwhile.
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
        """SIGTERM; after stop_timeout_s SIGKILL. Returns when no process of the group is left."""
        if self.alive:
            os.kill(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self.stop_timeout_s)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole group. Returns when none of it is left; start() may follow."""
        if self._process is None:
            return
        group = self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait(KILL_GRACE_S)
        deadline = time.monotonic() + KILL_GRACE_S
        while members := group_members(group):
            if time.monotonic() > deadline:
                raise EngineError(f"processes {members} of the engine survived SIGKILL")
            time.sleep(0.05)
        self._process = None

    def log_tail(self, lines: int = LOG_LINES_SHOWN) -> str:
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _health(self) -> int | None:
        """The HTTP status of its health, None without an answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5.0)
        try:
            connection.request("GET", self._health_path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

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
