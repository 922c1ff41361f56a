"""What the launcher concludes from an orchestrator that is silent."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from megatron_rl.config.orchestrator import RUN_KEY, OrchestratorConfig
from megatron_rl.launch.programs import OrchestratorFailed, OrchestratorKeeper
from megatron_rl.rollout.ports import choose_port

LISTENS = "import socket, sys, time; held = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(60)"
IMPORTS = "import time; time.sleep(60)"


@pytest.mark.parametrize(("program", "hangs"), [(LISTENS, True), (IMPORTS, False)])
def test_an_orchestrator_that_listens_and_has_never_answered_hangs(program, hangs, monkeypatch, tmp_path):
    """It may hang before the launcher has asked it once. One that does not listen yet may take its time."""
    monkeypatch.setenv(RUN_KEY, "a key")
    options, log = OrchestratorConfig(port=choose_port(None), hang_timeout_s=2.0, max_restarts=0), tmp_path / "a.log"
    log.touch()
    keeper = OrchestratorKeeper(options, log, lambda: subprocess.Popen(
        [sys.executable, "-c", program, str(options.port)], start_new_session=True))
    keeper.start()
    deadline, said = time.monotonic() + (60 if hangs else 9), ""
    try:
        while not said and time.monotonic() < deadline:
            try:
                keeper.look()
            except OrchestratorFailed as failed:
                said = str(failed)
            time.sleep(0.1)
    finally:
        keeper.stop()
    assert said.startswith("the orchestrator did not answer for orchestrator.hang_timeout_s=2, and had been") == hangs
