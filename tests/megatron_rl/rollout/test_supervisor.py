"""A local server that dies or hangs is started again; at the end none is left. With a server of a few lines."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from dataclasses import replace

import pytest

from megatron_rl.config.rollout import EngineConfig
from megatron_rl.rollout import engines
from megatron_rl.rollout import supervisor as supervisor_module
from megatron_rl.rollout.engines import EngineError, EngineProcess, group_members
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.supervisor import Supervisor

pytestmark = pytest.mark.slow

CONFIG = EngineConfig(health_interval_s=0.1, hang_timeout_s=120.0, max_restarts=2)
SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

STARTING_FOR_EVER = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        time.sleep(600 * Handler.asked)
        Handler.asked += 1
        self.send_response(503); self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(tmp_path, code: str = SERVER) -> EngineProcess:
    port = choose_port(None)
    return EngineProcess([sys.executable, "-c", code, str(port)], dict(os.environ), port=port,
                         log_path=tmp_path / f"{port}.log", start_timeout_s=240.0, stop_timeout_s=5.0)


def wait_for_another_pid(process: EngineProcess, supervisor: Supervisor, restarts: int) -> None:
    deadline = time.monotonic() + 240.0
    while supervisor.restarts < restarts or not process.alive or process._health() != 200:
        assert time.monotonic() < deadline, "not started again"
        time.sleep(0.05)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_it_is_started_again_and_the_other_is_left_alone(blow, tmp_path):
    victim, other = server(tmp_path), server(tmp_path)
    config = replace(CONFIG, hang_timeout_s=6.0) if blow is signal.SIGSTOP else CONFIG
    with Supervisor([victim, other], config) as supervisor:
        first, unharmed = victim.pid, other.pid
        os.killpg(first, blow)
        wait_for_another_pid(victim, supervisor, 1)
        assert victim.pid != first and other.pid == unharmed
        assert group_members(first) == []
        groups = [victim.pid, other.pid]
    assert [group_members(group) for group in groups] == [[], []]


def test_one_that_hangs_before_it_is_healthy_is_noticed_soon(tmp_path):
    process = server(tmp_path, STARTING_FOR_EVER)
    process.hang_timeout_s = 1.0
    process.start()
    try:
        with pytest.raises(EngineError, match="answered and then did not for rollout.engine.hang_timeout_s=1"):
            process.wait_until_healthy()
    finally:
        process.stop()


def test_an_engine_at_work_is_never_asked_for_its_health(tmp_path):
    """SGLang answers /health by a forward pass, and a colocated engine has given up the memory for it."""
    asked = tmp_path / "asked"
    process = server(tmp_path, SERVER.replace(
        "self.send", "open(sys.argv[2], 'a').write(self.path + ' '); self.send", 1))
    process.argv = (*process.argv, str(asked))
    with Supervisor([process], replace(CONFIG, health_interval_s=0.01)):
        deadline = time.monotonic() + 60.0
        while asked.read_text().count("/model_info") < 5:
            assert time.monotonic() < deadline, asked.read_text()
            time.sleep(0.05)
    started, *watched = asked.read_text().split("/model_info", 1)
    assert "/health" in started and "/health" not in watched[0]


def test_it_is_given_up_after_max_restarts(tmp_path, caplog):
    once = tmp_path / "started"
    process = server(tmp_path, f"""
import os, sys
if os.path.exists({str(once)!r}): sys.exit(3)
open({str(once)!r}, "w").close()
{SERVER}""")
    with caplog.at_level(logging.ERROR), Supervisor([process], CONFIG) as supervisor:
        os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 240.0
        while "given up" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert supervisor.restarts == 2


def test_one_that_has_served_for_long_counts_as_new(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor_module, "FORGIVEN_AFTER_S", 0.0)
    process = server(tmp_path)
    with Supervisor([process], replace(CONFIG, max_restarts=1)) as supervisor:
        (keeper,) = supervisor._keepers
        for restarts in (1, 2):
            os.killpg(process.pid, signal.SIGKILL)
            wait_for_another_pid(process, supervisor, restarts)
            while keeper._in_a_row:  # until it has looked at it
                time.sleep(0.05)


def test_one_that_cannot_be_started_stops_the_others(tmp_path):
    good = server(tmp_path)
    with pytest.raises(EngineError, match="exited with code 3"), Supervisor(
            [good, server(tmp_path, "import sys; sys.exit(3)")], CONFIG):
        pass
    assert good.pid is None


def test_one_that_ends_just_before_its_signal_is_stopped_all_the_same(tmp_path, monkeypatch):
    """Another thread that asks whether it is alive takes its exit code: then no process has its number any more."""
    process, members = server(tmp_path), engines.group_members

    def ends(group: int) -> list[int]:
        os.killpg(group, signal.SIGKILL)
        while process.alive:
            time.sleep(0.01)
        monkeypatch.setattr(engines, "group_members", members)
        return []

    process.start()
    monkeypatch.setattr(engines, "group_members", ends)
    process.stop()
    assert process.pid is None
