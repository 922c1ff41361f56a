"""The two programs of an RL run on this machine, started together and stopped together; no engine is started here.

An orchestrator that is killed, or hangs, is started again while the ranks wait. A rank that dies ends the run.
"""

from __future__ import annotations

import http.client
import logging
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_rl.config.load import to_dict
from megatron_rl.config.orchestrator import RUN_KEY, OrchestratorConfig
from megatron_rl.config.schema import Config
from megatron_rl.launch.local import (
    STOP_GRACE_S,
    RunFailed,
    RunInterrupted,
    after_start,
    check_disk,
    check_still_there,
    follow,
    how_to_go_on,
    how_to_resume,
    last_words,
    loopback_only,
    rank_environment,
    ranks_command,
    scratch_environment,
    stop_group,
    terminable,
)
from megatron_rl.loop import End, Ended
from megatron_rl.observe import lease
from megatron_rl.observe.files import write_json
from megatron_rl.orchestrator import stages, state
from megatron_rl.rollout.die_with_parent import with_parent
from megatron_rl.rollout.ports import choose_port

EXIT_CODES = {End.FINISHED: 0, End.UNFILLABLE: 3, End.STOPPED: 75}
"""75 is EX_TEMPFAIL of sysexits.h: try again later. 3: over before the last step, and trying again is of no use."""
HEALTH_TIMEOUT_S = 2.0
HEALTH_EVERY_S = 2.0
END_GRACE_S = 75.0  # observe/sinks.py: LOGGER_CLOSE_S, and a little more
HANG_GRACE_S = 3.0
KILLED_CODES = (137, 265)
"""The exit code of a shell or srun whose program was killed by SIGKILL; Popen says -9."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Programs:
    """What `python -m` runs, with further arguments and environment; tests put programs that die in their place."""

    orchestrator: Sequence[str] = ("megatron_rl.orchestrator",)
    trainer: Sequence[str] = ("megatron_rl.train", "rl")
    environment: Mapping[str, str] = field(default_factory=dict)


def run_rl(config: Config, programs: Programs = Programs()) -> Ended:
    """Both programs to the end of the run; with stages, one start of both for each. RunFailed or RunInterrupted."""
    while True:
        ended, is_last = _run_stage(config, programs)
        if is_last or ended.how is not End.FINISHED:
            return ended
        config = stages.resumed(config)


def _run_stage(config: Config, programs: Programs) -> tuple[Ended, bool]:
    run_dir = Path(config.run.dir)
    check_disk(run_dir)
    config, launch = prepared(config), run_dir / "launch.json"
    write_json(launch, to_dict(config))
    environment = rank_environment() | loopback_only(config) | programs.environment
    log_path = run_dir / "trainer.log"
    begin = log_path.stat().st_size if log_path.exists() else 0
    with after_start(), terminable(), scratch_environment() as temporary:
        environment = environment | temporary
        keeper = OrchestratorKeeper(config.orchestrator, run_dir / "orchestrator.log", lambda: started(
            [sys.executable, "-m", *programs.orchestrator, str(launch)], run_dir / "orchestrator.log",
            environment | {"CUDA_VISIBLE_DEVICES": ""}))
        ranks = started([*ranks_command(config), *programs.trainer, str(launch)], log_path, environment)
        try:
            try:
                keeper.start()
                follow(ranks, "rl", config, look=keeper.look)
                if ranks.poll() == 0:
                    keeper.wait_for_end()
            finally:
                code = stop_group(ranks)
                keeper.stop()
        except KeyboardInterrupt:  # what is said of the last checkpoint is said when no rank can save any more
            raise RunInterrupted(f"stopped; {how_to_resume(run_dir)}") from None
        except OrchestratorFailed as failed:
            check_still_there(run_dir)
            raise RunFailed(f"{failed}\n{how_to_go_on(run_dir, str(failed))}") from failed
    check_still_there(run_dir)
    ended = state.read_end(run_dir / state.FOLDER)
    if code or ended is None:
        words = last_words(log_path, begin)
        raise RunFailed(f"the rl ranks ended with exit code {code}; from {log_path}:\n{words}\n"
                        f"{how_to_go_on(run_dir, words)}")
    return ended


def started(command: Sequence[str], log_path: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """`command` in a process group of its own, which the kernel ends when this process ends."""
    with log_path.open("ab") as log:
        return subprocess.Popen(with_parent(command), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                start_new_session=True)


def prepared(config: Config, host: str | None = None) -> Config:
    """`config` with the place where the orchestrator will listen; its folder is emptied and the run's key drawn.

    lease.Superseded, before anything is emptied, if a newer start has taken run.dir.
    """
    lease.check(config.run.dir)
    shutil.rmtree(Path(config.run.dir) / state.FOLDER, ignore_errors=True)
    os.environ.setdefault(RUN_KEY, secrets.token_hex(32))
    options = config.orchestrator if host is None else replace(config.orchestrator, host=host)
    port = choose_port(options.port, host=options.host, key="orchestrator.port")
    return replace(config, orchestrator=replace(options, port=port))


class OrchestratorFailed(RuntimeError):
    """The orchestrator ended with an error, or too often; the message carries the end of its log."""


class OrchestratorKeeper:
    """The orchestrator's process: started again when it was killed or does not answer, at most max_restarts times."""

    def __init__(self, options: OrchestratorConfig, log_path: Path, start: Callable[[], subprocess.Popen]):
        self._options, self._log_path, self._start = options, log_path, start
        self._process: subprocess.Popen | None = None
        self._restarts = 0
        self._began = 0
        self._answered: float | None = None  # None: it does not listen yet; until then it may take its time
        self._asked = 0.0

    def start(self) -> None:
        self._began = self._log_path.stat().st_size if self._log_path.exists() else 0
        self._answered = None
        self._process = self._start()

    def look(self) -> None:
        """Called again and again. OrchestratorFailed when it cannot go on."""
        code = self._process.poll()
        if code is None:
            if self._hangs():
                stop_group(self._process, HANG_GRACE_S)
                self._restart(f"did not answer for orchestrator.hang_timeout_s={self._options.hang_timeout_s:g}")
        elif code < 0 or code in KILLED_CODES:
            self._restart("was killed")
        elif code:
            raise OrchestratorFailed(f"the orchestrator ended with exit code {code}; from {self._log_path}:\n"
                                     f"{last_words(self._log_path, self._began)}")

    def _restart(self, why: str) -> None:
        if self._restarts == self._options.max_restarts:
            raise OrchestratorFailed(f"the orchestrator {why}, and had been started again orchestrator.max_restarts="
                                     f"{self._restarts} times; from {self._log_path}:\n"
                                     f"{last_words(self._log_path, self._began)}")
        self._restarts += 1
        _LOG.warning("the orchestrator %s: starting it again (%d of orchestrator.max_restarts=%d)", why, self._restarts,
                     self._options.max_restarts)
        stop_group(self._process)  # what it had started goes with it: judges, above all
        self.start()

    def _hangs(self) -> bool:
        now = time.monotonic()
        if now - self._asked < HEALTH_EVERY_S:
            return False
        self._asked = now
        if self._healthy():
            self._answered = now
        return self._answered is not None and now - self._answered > self._options.hang_timeout_s

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(self._options.host, self._options.port, timeout=HEALTH_TIMEOUT_S)
        try:
            connection.connect()
            if self._answered is None:  # it listens, so from here on it has to answer
                self._answered = time.monotonic()
            connection.request("GET", "/health", headers={"Authorization": f"Bearer {os.environ[RUN_KEY]}"})
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def poll(self) -> int | None:
        """0 once the orchestrator has ended well."""
        return 0 if self._process.poll() == 0 else None

    def wait_for_end(self) -> None:
        """The ranks have ended well: it has nothing left to do but to close its files."""
        try:
            self._process.wait(END_GRACE_S)
        except subprocess.TimeoutExpired:
            _LOG.warning("the orchestrator did not end within %g s of the trainer, and is stopped", END_GRACE_S)

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        if self._process is not None:
            stop_group(self._process, grace_s)
