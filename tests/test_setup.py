"""The set-up script's refusals, in a copy of the files it reads; nothing is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "trainer,rewards,report,slurm,docs,dev"
ENGINE = {"cpu": "engine-cpu", "gpu": "engine"}


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def run_setup(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", ".ci/setup.sh"], cwd=folder, env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=120)


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


def command(folder: Path, name: str, script: str) -> str:
    """A PATH on which `name` is a shell script."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"{path.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize(("found", "said"), [("echo glibc 2.31", "this system has glibc 2.31"),
                                             ("exit 1", "this system has glibc 0 (another C library)")])
def test_a_glibc_too_old_for_the_engine_is_refused_before_anything_is_made(copy, found, said):
    failed = run_setup(copy, PATH=command(copy, "getconf", found))
    assert failed.returncode == 1
    assert said in failed.stderr and "need glibc 2.34 or later" in failed.stderr
    assert not (copy / ".venv").exists()


@pytest.mark.parametrize(("environment", "said"), [
    ({"VARIANT": "cpu", "TE": "1"}, "TE=1 needs VARIANT=gpu"), ({"VARIANT": "gpu", "TE": "yes"}, "TE=yes: must be 1")])
def test_transformer_engine_is_asked_for_with_the_gpu_variant(copy, environment, said):
    failed = run_setup(copy, **environment)
    assert failed.returncode == 1 and said in failed.stderr
    assert not (copy / ".venv").exists()


PIP = """\
case "$*" in
*"pip --version"*) exit 0 ;;
*"version_info"*) exit 0 ;;
*"purelib"*) echo "$PWD/site" ;;
*) echo "$*" >>"$PWD/pip.log" ;;
esac"""


def installed(copy: Path, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """What the set-up would have pip do, with a Python that writes it down."""
    (copy / ".venv" / "bin").mkdir(parents=True)
    command(copy, "python", PIP)
    (copy / "bin" / "python").rename(copy / ".venv" / "bin" / "python")
    done = run_setup(copy, **environment)
    log = copy / "pip.log"
    return done, [line for line in log.read_text().splitlines() if " install " in line] if log.exists() else []


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_everything_is_installed_by_the_lock_and_nothing_is_compiled(copy, variant):
    done, commands = installed(copy, VARIANT=variant)
    assert done.returncode == 0, done.stderr
    assert f"-c .ci/constraints-{variant}.txt -e .[{ENGINE[variant]},{PROGRAM}]" in commands[0]
    assert not any("--no-build-isolation" in line or ",te" in line for line in commands)
    assert len(commands) == (2 if variant == "cpu" else 1)


def test_transformer_engine_comes_last_and_its_missing_headers_are_named(copy):
    done, commands = installed(copy, VARIANT="gpu", TE="1")
    assert done.returncode == 1
    assert "Transformer Engine needs cuda_runtime.h, which none of" in done.stderr
    assert len(commands) == 1  # the rest is there
    nvidia = copy / "site" / "nvidia"
    for header in ("cu13/include/cuda_runtime.h", "cu13/include/crt/host_config.h", "cudnn/include/cudnn.h",
                   "nccl/include/nccl.h"):
        (nvidia / header).parent.mkdir(parents=True, exist_ok=True)
        (nvidia / header).touch()
    (copy / "pip.log").unlink()
    done = run_setup(copy, VARIANT="gpu", TE="1", PATH=command(copy, "c++", "exit 0"))
    assert done.returncode == 0, done.stderr
    first, last = [line for line in (copy / "pip.log").read_text().splitlines() if " install " in line]
    assert f"-c .ci/constraints-gpu.txt -e .[engine,{PROGRAM}]" in first
    assert ("--no-build-isolation -c .ci/constraints-gpu.txt -c .ci/constraints-te.txt "
            f"-e .[engine,te,{PROGRAM}]") in last
