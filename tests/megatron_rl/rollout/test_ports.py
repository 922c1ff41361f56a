"""No two servers are told the same port, although each takes long to bind its own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.rollout import ports
from megatron_rl.rollout.ports import choose_port

ROOT = Path(__file__).resolve().parents[3]
ANOTHER = """
import sys
from megatron_rl.rollout import ports
ports.PORTS, ports.MARK, ports._can_bind = range(1000, 1004), "\\0" + sys.argv[1], lambda *_: True
print(*(ports.choose_port(None) for _ in range(2)), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_ports(monkeypatch) -> str:
    """Four ports that nobody binds, and marks whose names no other test has; their names' beginning."""
    name = f"megatron_rl.test.{os.getpid()}."
    for key, value in {"PORTS": range(1000, 1004), "MARK": f"\0{name}", "_can_bind": lambda *_: True, "_drawn": set(),
                       "_marks": {}}.items():
        monkeypatch.setattr(ports, key, value)
    return name


def test_servers_that_start_later_get_each_a_port_of_their_own():
    """Engines that serve other machines have two: one for requests, one for the store of their ranks."""
    assert sorted(choose_port(None) for _ in range(4)) == [1000, 1001, 1002, 1003]
    with pytest.raises(ValueError, match="no port from 1000 to 1003 is free"):
        choose_port(None)


def test_what_another_process_has_drawn_is_drawn_again_only_after_its_end(own_ports):
    another = subprocess.Popen([sys.executable, "-c", ANOTHER, own_ports], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, cwd=ROOT)
    theirs = {int(port) for port in another.stdout.readline().split()}
    ours = {choose_port(None) for _ in range(2)}
    assert len(theirs) == len(ours) == 2 and theirs | ours == set(ports.PORTS)
    with pytest.raises(ValueError, match="no port from 1000 to 1003 is free"):
        choose_port(None)
    another.communicate()
    assert {choose_port(None) for _ in range(2)} == theirs


def test_a_process_that_was_forked_draws_nothing_of_its_parents(monkeypatch):
    """All four ports are of one share, which its parent holds and goes on drawing from."""
    monkeypatch.setattr(ports, "SHARES", 1)
    assert choose_port(None) in ports.PORTS
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(ValueError, match="no port from 1000"):
        pool.apply(choose_port, (None,))
    assert choose_port(None) in ports.PORTS


def test_a_process_takes_few_shares_from_others(monkeypatch):
    monkeypatch.setattr(ports, "PORTS", range(1000, 1100))
    monkeypatch.setattr(ports, "SHARES", 10)
    for _ in range(25):
        choose_port(None)
    assert len(ports._marks) == 3, "of ten ports each"
