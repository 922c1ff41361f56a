"""Only the newest start of a run writes into its folder; programs of older ones end, whatever they are doing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rl.launch.claim import claimed
from megatron_rl.observe import lease

ROOT = Path(__file__).resolve().parents[3]
OLDER = """
import sys, time
from megatron_rl.launch.claim import claimed
from megatron_rl.observe import lease
with claimed(sys.argv[1], job="7"):
    lease.take(sys.argv[1])
    lease.Watch(sys.argv[1]).start()
    print("works", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    monkeypatch.setenv(lease.START_NUMBER, "")  # so that what a test sets is undone


@pytest.fixture
def older(tmp_path):
    """Another process, an older start of job 7 in tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", OLDER, str(tmp_path / "run")], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=ROOT,
                               env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"})
    assert process.stdout.readline() == "works\n"
    yield process
    process.kill()
    process.communicate()


def test_a_newer_start_of_the_job_takes_the_folder_and_the_older_one_ends(older, tmp_path, capsys):
    before = time.monotonic()
    with claimed(tmp_path / "run", job="7"):
        assert older.wait(5) == lease.EXIT_CODE
        assert time.monotonic() - before < 10
        assert "start 2 of the run" in older.stderr.read()
        lease.check(tmp_path / "run")
    assert f"process {older.pid} on " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("job", [None, "8"])
def test_another_job_is_refused_and_the_older_one_goes_on(job, older, tmp_path):
    with pytest.raises(ValueError, match=f"is in use by process {older.pid}"), claimed(tmp_path / "run", job=job):
        pass
    time.sleep(lease.CHECK_S + 0.5)
    assert older.poll() is None


def test_a_start_that_has_been_overtaken_may_not_write(tmp_path, monkeypatch):
    assert lease.take(tmp_path) == 1
    lease.check(tmp_path)
    ours = os.environ[lease.START_NUMBER]
    assert lease.take(tmp_path) == 2
    lease.check(tmp_path)
    monkeypatch.setenv(lease.START_NUMBER, ours)
    with pytest.raises(lease.Superseded, match="start 2 of the run, on .* start 1 ends here"):
        lease.check(tmp_path)
    lease.check(tmp_path / "another")  # whose starts this process is none of


def test_a_lock_that_nobody_gives_back_is_replaced(older, tmp_path, monkeypatch):
    """A node that lost its power may leave its lock on a file server for good."""
    monkeypatch.setattr("megatron_rl.launch.claim.TAKE_OVER_S", 1.0)
    os.kill(older.pid, 19)  # SIGSTOP: it cannot look at the lease
    with claimed(tmp_path / "run", job="7"):
        assert str(os.getpid()) in (tmp_path / "run" / "run.lock").read_text()
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"), claimed(tmp_path / "run"):
            pass
        os.kill(older.pid, 18)
        assert older.wait(5) == lease.EXIT_CODE
        assert str(os.getpid()) in (tmp_path / "run" / "run.lock").read_text(), "it took the newer start's lock away"
