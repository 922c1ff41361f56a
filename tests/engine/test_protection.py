"""What a run protects itself from, and what it leaves behind: whole runs through the command line."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from megatron_rl.launch.local import rank_environment
from megatron_rl.model.checkpoint_files import saved_steps
from megatron_rl.rollout.scratch import LONGEST_TMPDIR
from tests.engine.test_runs import ROOT, command, rows, start

pytestmark = pytest.mark.slow


OWN_SHARED_MEMORY = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/shm && left=$0 && "$@"; code=$?; '
                     'ls -A /dev/shm > "$left"; exit $code')
"""Runs a command whose shared memory no other process of the machine sees; what is left there is listed in the file
that the first argument names."""


def listening(family: list[psutil.Process]) -> set[str]:
    """Addresses other than loopback on which these processes wait for connections."""
    found = set()
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found |= {connection.laddr.ip for connection in one.net_connections("tcp")
                      if connection.status == psutil.CONN_LISTEN}
    assert found, "the run's own servers"
    return found - {"127.0.0.1", "::1"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount shared memory of its own")
def test_a_run_in_a_folder_of_any_name_leaves_nothing_outside_it(model, tmp_path):
    """With an engine of its own, reward processes and wandb; after it, TMPDIR and shared memory are as before."""
    run_dir, temporary = tmp_path / "l\u00e4ufe, 2. \u6570" / "a=b", Path(tempfile.mkdtemp(dir="/tmp"))
    here = shutil.copytree(model, tmp_path / "mod\u00e8le")
    words = command(f"model.path={here}", f"run.dir={run_dir}", "run.steps=2", "eval.problems=2",
                    "observe.wandb=offline", "rollout.engine.deterministic=false")
    done = subprocess.run(
        [*OWN_SHARED_MEMORY, str(tmp_path / "left"), *words], cwd=ROOT, capture_output=True, text=True, timeout=1200,
        env=rank_environment() | {"TMPDIR": str(temporary)})
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(run_dir)] == [1, 2] and (run_dir / "hf" / "model.safetensors").is_file()
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    kept = {f"torchinductor_{getpass.getuser()}"}  # torch's cache, for later runs
    assert set(os.listdir(temporary)) <= kept
    shutil.rmtree(temporary)
    assert (tmp_path / "left").read_text() == ""
    assert not (run_dir / "run.lock").exists()


def test_a_live_run_keeps_others_out_and_listens_to_this_machine_alone(model, tmp_path):
    run_dir = tmp_path / "run"
    process, family = start(model, run_dir)
    try:
        assert listening(family) == set()
        for resume in ("false", "true", "auto"):
            other = subprocess.run(command(f"model.path={model}", f"run.dir={run_dir}", f"resume={resume}"), cwd=ROOT,
                                   env=rank_environment(), capture_output=True, text=True, timeout=300)
            assert other.returncode == 2, other.stderr
            assert f"run.dir={run_dir} is in use by process {process.pid} on " in other.stderr
        steps = len(rows(run_dir))
        run_dir.rename(tmp_path / "removed")  # all that the run has saved is gone at once, whatever it writes meanwhile
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 1 and steps >= 3, errors
        assert f"run.dir={run_dir} was removed while the run went on" in errors and "resume" not in errors
        _, alive = psutil.wait_procs(family, timeout=120)
        assert not alive
    finally:
        process.kill()


@pytest.mark.parametrize("recipe", ["rl", "sft", "evaluate"])
def test_a_tmpdir_too_long_for_sockets_is_named_before_anything_starts(recipe, model, tmp_path):
    long = tmp_path / ("x" * LONGEST_TMPDIR)
    long.mkdir()
    words = [sys.executable, "-m", "megatron_rl.cli", recipe, "experiment=quickstart", f"model.path={model}",
             f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(words, cwd=ROOT, env=rank_environment() | {"TMPDIR": str(long)}, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert f"TMPDIR={long} has" in done.stderr and f"at most {LONGEST_TMPDIR} bytes" in done.stderr
    assert not Path(tmp_path / "run").exists() or not saved_steps(tmp_path / "run" / "checkpoints")
