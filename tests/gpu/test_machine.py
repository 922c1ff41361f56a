"""What a GPU machine may lack, each on a faked one: driver, nvcc, shared memory, glibc, half of Transformer Engine."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_rl import doctor
from megatron_rl.cli import main
from megatron_rl.compat import cuda
from megatron_rl.config.load import load
from megatron_rl.launch.local import rank_environment
from megatron_rl.model.architectures import read_config
from megatron_rl.preflight_gpu import check_driver, check_shared_memory, check_transformer_engine
from megatron_rl.rollout.engine_command import engine_command
from tests.tiny_models import write_tiny_bailing


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(name, script): puts a shell script first on the PATH."""
    def make(name: str, script: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return path

    return make


def row(name: str) -> doctor.Check:
    (found,) = [check for check in doctor.all_checks() if check.name == name]
    return found


@pytest.mark.parametrize(("driver", "status"), [("570.86.10", "missing"), ("580.65.06", "ok"), ("610.1", "ok")])
def test_a_driver_too_old_for_torch_is_told_and_refused(program, monkeypatch, driver, status):
    program("nvidia-smi", f"echo {driver}\necho {driver}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert row("GPU driver").status == status and driver in row("GPU driver").found
    if status == "ok":
        check_driver()
        return
    with pytest.raises(ValueError, match="driver 570.86.10 is too old for CUDA 13.0.* 580 or later.*on the CPU"):
        check_driver()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the CPU is meant
    check_driver()


def test_no_driver_is_a_cpu_machine(program):
    program("nvidia-smi", "exit 9")
    assert row("GPU driver").status == "optional"
    check_driver()


def toolkit(folder: Path) -> Path:
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "bin" / "nvcc").chmod(0o755)
    return folder


@pytest.fixture
def no_toolkit(tmp_path, monkeypatch):
    """A machine where nothing has nvcc: neither the environment nor the system. Returns the environment's folder."""
    site = tmp_path / "site"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(site))
    monkeypatch.setattr(cuda, "SYSTEM_TOOLKIT", tmp_path / "usr-local-cuda")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    return site


def test_a_missing_nvcc_is_told_and_that_of_the_environment_is_found_and_handed_to_the_engine(
        no_toolkit, tmp_path, monkeypatch):
    assert cuda.cuda_home() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check = doctor.check_nvcc()
    assert check.status == "missing" and "make setup VARIANT=gpu" in check.remedy
    home = toolkit(no_toolkit / "nvidia" / "cu13")
    assert doctor.check_nvcc().found == str(home / "bin" / "nvcc")
    config = load(["model.dtype=bfloat16"])
    _, environment = engine_command(config.rollout.engine, config.rollout, "model", 1234, model_dtype="bfloat16")
    assert environment["CUDA_HOME"] == str(home)
    assert environment["PATH"].split(os.pathsep)[0] == str(home / "bin")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "mine")))
    assert cuda.cuda_home() == tmp_path / "mine"


def test_a_script_that_calls_another_nvcc_is_no_toolkit(no_toolkit, tmp_path, program, monkeypatch):
    program("nvcc", "exec /elsewhere/nvcc")
    assert cuda.cuda_home() is None
    assert cuda.cuda_home() != tmp_path
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.check_nvcc().status == "optional"  # a CPU needs none


def shared_memory(monkeypatch, mebibytes: int) -> None:
    """os.statvfs of /dev/shm alone."""
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=mebibytes * 256, f_frsize=4096)
                        if path == "/dev/shm" else real(path))


def test_a_small_dev_shm_is_told_and_a_bucket_that_exceeds_it_is_refused(tmp_path, monkeypatch):
    shared_memory(monkeypatch, 64)
    assert row("/dev/shm").found == "64 MiB free" and row("/dev/shm").status == "optional"
    assert "--shm-size" in row("/dev/shm").remedy
    network = read_config(write_tiny_bailing(tmp_path / "model"))
    check_shared_memory(load([]), network)  # the model is smaller than that
    shared_memory(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"rollout.publish=tensor .* 0 MiB are free: lower rollout.bucket_bytes"):
        check_shared_memory(load([]), network)
    check_shared_memory(load(["rollout.publish=disk"]), network)
    shared_memory(monkeypatch, 1024)
    assert row("/dev/shm").status == "ok"


@pytest.mark.parametrize(("found", "status"), [("glibc 2.31", "missing"), ("glibc 2.34", "ok"), ("glibc 2.40", "ok"),
                                               (None, "missing")])
def test_a_glibc_that_the_engine_cannot_be_installed_on_is_told(monkeypatch, found, status):
    monkeypatch.setattr(os, "confstr", lambda name: found)
    assert row("glibc").status == status


@pytest.fixture
def half_installed(tmp_path, monkeypatch):
    """transformer_engine as it is without its part for torch (transformer_engine/common: _get_shared_object_file)."""
    package = tmp_path / "half" / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text('raise FileNotFoundError("Could not find shared object file: torch")\n')
    monkeypatch.syspath_prepend(str(tmp_path / "half"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "half"), *sys.path]))
    return package


def test_half_of_transformer_engine_is_told_and_refused_before_ranks_start(half_installed, tmp_path, capsys):
    assert row("Transformer Engine").status == "missing"
    assert "Could not find shared object file: torch" in row("Transformer Engine").found
    for backend, start in (("auto", "^Transformer"), ("transformer_engine", r"^model\.backend=transformer_engine: Tr")):
        with pytest.raises(ValueError, match=f"{start}.* in part .*make setup VARIANT=gpu TE=1.*pip uninstall"):
            check_transformer_engine(backend)
    model = write_tiny_bailing(tmp_path / "model")
    for command in ("rl", "sft"):
        assert main([command, f"model.path={model}", f"run.dir={tmp_path / 'run'}"]) == 2
        assert "Transformer Engine is installed in part" in capsys.readouterr().err
    (half_installed / "__init__.py").write_text("")
    assert row("Transformer Engine").status == "ok"
    check_transformer_engine("transformer_engine")


def test_no_transformer_engine_is_fine():
    if cuda.transformer_engine()[0]:
        pytest.skip("Transformer Engine is installed here")
    assert row("Transformer Engine").status == "optional"
    check_transformer_engine("auto")


def test_a_backend_that_is_not_installed_is_refused_on_a_gpu_machine(monkeypatch, capsys):
    """A login node without GPUs need not have it: its job looks."""
    if cuda.transformer_engine()[0]:
        pytest.skip("Transformer Engine is installed here")
    asked = ["rl", "--check", "experiment=ring_lite_rl_stage1", "model.backend=transformer_engine",
             "slurm.gpus_per_node=8", "slurm.nodes=32"]
    assert main(asked) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(asked) == 2
    assert re.search(r"model\.backend=transformer_engine: Transformer Engine is not installed: .*TE=1.*backend=torch",
                     capsys.readouterr().err)


@pytest.mark.parametrize("mine", [{}, {"NCCL_CUMEM_ENABLE": "1"}])
def test_ranks_and_engines_agree_on_what_nccl_must_have_alike(monkeypatch, mine):
    """SGLang sets both variables if nobody did; ranks beside it would keep NCCL's defaults."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in cuda.SAME_IN_RANKS_AND_ENGINES:
        monkeypatch.delenv(name, raising=False)
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    config = load([])
    _, engine = engine_command(config.rollout.engine, config.rollout, "model", 1234)
    expected = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"} | mine
    assert {name: engine[name] for name in expected} == expected
    assert {name: rank_environment()[name] for name in expected} == expected
