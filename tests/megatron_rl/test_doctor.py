"""The doctor fails only for what is required, and says how to get it."""

import io

from rich.console import Console

from megatron_rl import doctor
from megatron_rl.doctor import Check, check_cores, check_disk, check_gpu, check_memory, check_package, check_python


def test_every_row_says_what_it_is_for_and_every_gap_how_to_fill_it():
    checks = doctor.all_checks()
    assert {"Python 3.12", "torch", "GPU", "NCCL", "megatron-core", "sglang", "transformers", "math-verify", "sandbox",
            "compilers", "Slurm", "free disk", "loopback port", "memory", "cores", "GPU driver", "nvcc", "/dev/shm",
            "Transformer Engine", "glibc"} == {check.name for check in checks}
    assert all(check.purpose and check.found for check in checks)
    assert all(check.remedy for check in checks if check.status != "ok")


def test_exit_code_agrees_with_the_table(monkeypatch):
    """Both of one look at the machine, whose free memory and disk change from moment to moment."""
    checks, file = doctor.all_checks(), io.StringIO()
    monkeypatch.setattr(doctor, "all_checks", lambda: checks)
    code = doctor.run_doctor(Console(file=file, width=200))
    assert code == int("missing" in {check.status for check in checks})
    assert "sglang" in file.getvalue()


def test_only_a_missing_requirement_fails():
    console = Console(file=io.StringIO())
    optional = Check("GPU", "optional", "none", "speed", "buy one")
    missing = Check("sglang", "missing", "not installed", "engine", "make setup")
    assert doctor.verdict([optional], console) == 0
    assert doctor.verdict([optional, missing], console) == 1
    assert "sglang" in console.file.getvalue()


def test_another_version_of_megatron_fails_and_another_torch_does_not():
    pins = {"megatron-core": "0.0.1", "torch": "0.0.1"}
    assert check_package("megatron-core", pins, "trainer").status == "missing"
    assert check_package("torch", pins, "tensors", any_version=True).status == "optional"
    assert "tested with 0.0.1" in check_package("torch", pins, "tensors", any_version=True).found
    assert check_package("no-such-distribution", pins, "nothing", any_version=True).status == "missing"


def test_thresholds():
    assert check_python((3, 12, 1)).status == "ok" and check_python((3, 13, 0)).status == "missing"
    assert check_disk(1.9).status == "missing" and check_disk(2.0).status == "ok"
    assert check_memory(3.9).status == "missing" and check_memory(4.0).status == "ok"
    assert check_cores(1).status == "optional" and check_cores(2).status == "ok"
    assert check_gpu([]).status == "optional" and check_gpu(["H100"]).found == "1 x H100"


def test_a_sandbox_that_cannot_run_is_not_ok():
    assert doctor.check_sandbox("no-such-command").status == "optional"
    refused = doctor.check_sandbox("false")
    assert refused.status == "optional" and "fails" in refused.found
