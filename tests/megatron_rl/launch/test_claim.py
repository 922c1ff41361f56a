"""Two processes never work in one folder, and a dead one holds nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl import cli
from megatron_rl.launch.claim import LOCK, claimed
from tests.tiny_models import write_tiny_bailing

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, time
from megatron_rl.launch.claim import claimed
with claimed(sys.argv[1]):
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that works in tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True,
                               cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"})
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("command", [["rl"], ["rl", "resume=true"], ["rl", "resume=auto"], ["sft"],
                                     ["sft", "resume=true"], ["evaluate"]], ids=" ".join)
def test_a_folder_in_use_is_refused_with_the_other_process(command, holder, tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    before = sorted((tmp_path / "run").iterdir())
    words = [*command, f"model.path={model}", f"run.dir={tmp_path / 'run'}", "data.source=chains"]
    assert cli.main([*words, "rollout.max_context_tokens=128"]) == 2
    said = capsys.readouterr().err
    assert f"run.dir={tmp_path / 'run'} is in use by process {holder.pid} on " in said and "(-c " in said, said
    assert sorted((tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(blow, holder, tmp_path):
    holder.send_signal(blow)
    holder.wait()
    with claimed(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()


def test_nothing_stays_and_a_folder_made_for_the_claim_goes(tmp_path):
    with claimed(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with claimed(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_folder_that_is_removed_meanwhile_is_no_error(tmp_path):
    with claimed(tmp_path / "gone"):
        (tmp_path / "gone" / LOCK).unlink()
        (tmp_path / "gone").rmdir()
    assert not (tmp_path / "gone").exists()


def test_a_folder_that_its_last_owner_takes_along_is_made_again(tmp_path, monkeypatch):
    """The owner had made it, and ends between another's look at the folder and its lock."""
    (tmp_path / "run").mkdir()
    make, leaves = Path.mkdir, [tmp_path / "run"]

    def made(path, *args, **options) -> None:
        make(path, *args, **options)
        if leaves:
            leaves.pop().rmdir()

    monkeypatch.setattr(Path, "mkdir", made)
    with claimed(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()
    assert not leaves


def count(folder: str, times: int) -> int:
    """Adds `times` to a counter in the folder, one at a time, each under a claim; how often it was refused."""
    refused, done = 0, 0
    while done < times:
        try:
            with claimed(folder):
                path = Path(folder) / "counter"
                path.write_text(str(int(path.read_text() or 0) + 1))
                done += 1
        except ValueError:
            refused += 1
    return refused


def test_claims_that_come_and_go_at_once_never_overlap(tmp_path):
    (tmp_path / "counter").write_text("0")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(count, [(str(tmp_path), 50)] * 4)
    assert (tmp_path / "counter").read_text() == "200"
