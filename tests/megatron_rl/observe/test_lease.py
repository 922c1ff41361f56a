"""Only the newest start of a run writes into its folder; programs of older ones end, whatever they are doing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import RunConfig
from megatron_rl.launch.claim import claimed
from megatron_rl.launch.programs import prepared
from megatron_rl.loop import End, Ended
from megatron_rl.model.checkpoint import Checkpoints
from megatron_rl.observe import lease
from megatron_rl.orchestrator import state

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
    with claimed(tmp_path / "run", job="7"):
        assert older.wait(60) == lease.EXIT_CODE
        assert "start 2 of the run" in older.stderr.read()
        lease.check(tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert f"process {older.pid} on " in said and "has not ended" not in said


@pytest.mark.parametrize("job", [None, "8"])
def test_another_job_is_refused_and_the_older_one_goes_on(job, older, tmp_path):
    with pytest.raises(ValueError, match=f"is in use by process {older.pid}"), claimed(tmp_path / "run", job=job):
        pass
    time.sleep(lease.CHECK_S + 0.5)
    assert older.poll() is None


def take_elsewhere(run_dir: Path) -> int:
    """A newer start takes the folder; this process stays one of the older start."""
    ours = os.environ[lease.START_NUMBER]
    number = lease.take(run_dir)
    os.environ[lease.START_NUMBER] = ours
    return number


def test_a_start_that_has_been_overtaken_may_not_write(tmp_path):
    assert lease.take(tmp_path) == 1
    lease.check(tmp_path)
    assert lease.take(tmp_path) == 2
    lease.check(tmp_path)
    assert lease.take(tmp_path) == 3 and take_elsewhere(tmp_path) == 4
    with pytest.raises(lease.Superseded, match="start 4 of the run, on .* start 3 ends here"):
        lease.check(tmp_path)
    lease.check(tmp_path / "another")  # whose starts this process is none of


def test_a_folder_that_was_removed_and_begun_anew_is_the_newer_starts(tmp_path):
    """Numbers begin again there, so the older start's may be the higher one, or the same."""
    for starts in (1, 5):
        run_dir = tmp_path / str(starts)
        run_dir.mkdir()
        assert [lease.take(run_dir) for _ in range(starts)][-1] == starts
        shutil.rmtree(run_dir)
        run_dir.mkdir()
        assert take_elsewhere(run_dir) == 1
        with pytest.raises(lease.Superseded, match="start 1 of the run"):
            lease.check(run_dir)


@pytest.mark.parametrize("away", ["gone", "half"])
def test_a_lease_that_cannot_be_read_ends_nothing_but_lets_nothing_be_written(away, tmp_path, monkeypatch):
    lease.take(tmp_path)
    file = tmp_path / lease.LEASE
    whole = file.read_text()
    file.unlink() if away == "gone" else file.write_text(whole[:20])
    assert lease.superseded(tmp_path) is None
    monkeypatch.setattr(lease, "UNREAD_S", 1.0)
    with pytest.raises(OSError, match="lease.json cannot be read.*writes nothing there"):
        lease.check(tmp_path)
    monkeypatch.setattr(lease, "UNREAD_S", 60.0)
    back = threading.Timer(0.3, file.write_text, [whole])
    back.start()
    lease.check(tmp_path)
    back.join()


def test_a_machine_that_reaches_the_folder_through_a_link_looks_at_the_same_lease(tmp_path, monkeypatch):
    """run.dir=run in a home that is /export/home on one machine and /home on another."""
    (tmp_path / "export" / "run").mkdir(parents=True)
    (tmp_path / "home").symlink_to("export")
    lease.take(tmp_path / "home" / "run")
    take_elsewhere(tmp_path / "home" / "run")
    monkeypatch.chdir(tmp_path / "home")  # whose name is export/ from here on
    with pytest.raises(lease.Superseded):
        lease.check("run")


def test_nothing_of_an_older_orchestrator_reaches_its_successors_folder(tmp_path):
    """The launcher has emptied it; a step or an end in it would be taken for the newer start's."""
    folder = tmp_path / state.FOLDER
    folder.mkdir()
    lease.take(tmp_path)
    start, ended = state.Start(None, 0, 0, False, 2), Ended(End.FINISHED)
    start.write(folder)
    take_elsewhere(tmp_path)
    for write in (lambda: start.write(folder), lambda: state.write_end(folder, ended, is_last=True),
                  lambda: state.OfferedStep(0, [b""], {}, [], 0.0, 0.0, {}).write(folder)):
        with pytest.raises(lease.Superseded):
            write()
    assert state.read_end(folder) is None and state.read_offered(folder) is None
    with pytest.raises(lease.Superseded):
        prepared(load(["experiment=quickstart", f"run.dir={tmp_path}"]))
    assert state.read_start(folder) == start


def test_a_lock_that_nobody_gives_back_is_replaced(older, tmp_path, monkeypatch):
    """A node that lost its power may leave its lock on a file server for good."""
    monkeypatch.setattr("megatron_rl.launch.claim.TAKE_OVER_S", 1.0)
    os.kill(older.pid, 19)  # SIGSTOP: it cannot look at the lease
    with claimed(tmp_path / "run", job="7"):
        assert str(os.getpid()) in (tmp_path / "run" / "run.lock").read_text()
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"), claimed(tmp_path / "run"):
            pass
        os.kill(older.pid, 18)
        assert older.wait(60) == lease.EXIT_CODE
        assert str(os.getpid()) in (tmp_path / "run" / "run.lock").read_text(), "it took the newer start's lock away"


def test_an_older_start_leaves_the_newer_ones_unfinished_checkpoint_alone(tmp_path):
    """It has the same name if both are at the same step."""
    mine = SimpleNamespace(_run=RunConfig(dir=str(tmp_path), keep_checkpoints=1), folder=tmp_path / "checkpoints",
                           _topology=SimpleNamespace(is_main=True, gather_objects=lambda value: [value]))
    mine._partial = lambda step: Checkpoints._partial(mine, step)
    lease.take(tmp_path)
    Checkpoints._make_folder(mine, partial := mine._partial(3))
    take_elsewhere(tmp_path)
    with pytest.raises(lease.Superseded):
        Checkpoints._make_folder(mine, partial)
    with pytest.raises(lease.Superseded):
        Checkpoints._commit(mine, SimpleNamespace(step=3, manifest={}))
    with pytest.raises(OSError, match="step 3 could not be saved"):
        Checkpoints._agree(mine, 3, OSError("no space"))
    assert list((tmp_path / "checkpoints").iterdir()) == [partial] and not list(partial.iterdir())
