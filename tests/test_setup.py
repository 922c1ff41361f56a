"""The set-up script's refusals, in a copy of the files it reads; nothing is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def run_setup(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", ".ci/setup.sh"], cwd=folder, env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=600)


def test_a_python_that_is_not_312_is_refused_by_running_it(copy):
    failed = run_setup(copy, PYTHON="/bin/true-ish")
    assert failed.returncode == 1
    assert "PYTHON=/bin/true-ish is not a working Python 3.12" in failed.stderr
    assert not (copy / ".venv").exists()


def test_an_unknown_variant_is_refused(copy):
    failed = run_setup(copy, VARIANT="tpu")
    assert failed.returncode == 1
    assert "VARIANT=tpu: must be cpu or gpu" in failed.stderr


def test_a_disk_too_full_for_an_environment_is_refused_before_anything_is_made(copy):
    df = copy / "bin" / "df"
    df.parent.mkdir()
    df.write_text("#!/bin/sh\necho Filesystem 1024-blocks Used Available\necho /dev/vda 100000000 95000000 5000000\n")
    df.chmod(0o755)
    failed = run_setup(copy, PATH=f"{df.parent}:{os.environ['PATH']}")
    assert failed.returncode == 1
    assert "4 GB free in" in failed.stderr and "a new environment needs 10 GB" in failed.stderr
    assert not (copy / ".venv").exists()
