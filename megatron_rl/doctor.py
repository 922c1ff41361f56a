"""`megatron-rl doctor`: is this machine fit to train, and if not, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_rl.compat.cuda import (
    cuda_home,
    driver_fault,
    driver_version,
    shared_memory_bytes,
    transformer_engine,
)
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.observe.versions import gpu_names, package_version, usable_cores
from megatron_rl.reward.languages import LANGUAGES
from megatron_rl.reward.sandbox import Bubblewrap
from megatron_rl.reward.sandbox.box import GET_IT

Status = Literal["ok", "optional", "missing"]
COLORS = {"ok": "green", "optional": "yellow", "missing": "bold red"}
NEEDED_DISK_GB = 2
NEEDED_MEMORY_GB = 4


@dataclass(frozen=True)
class Check:
    """One row. optional: not there, and only some uses need it; missing: nothing trains without it."""

    name: str
    status: Status
    found: str
    purpose: str
    remedy: str = ""


def run_doctor(console: Console | None = None) -> int:
    """Prints the table; 1 if something required is missing, else 0."""
    console = console if console is not None else Console()
    checks = all_checks()
    table = Table(title="megatron-rl doctor")
    for column in ("", "status", "found", "what it is for", "how to get it"):
        table.add_column(column, overflow="fold")
    for check in checks:
        remedy = "" if check.status == "ok" else check.remedy
        status = f"[{COLORS[check.status]}]{check.status}[/]"
        table.add_row(check.name, status, escape(check.found), escape(check.purpose), escape(remedy))
    console.print(table)
    return verdict(checks, console)


def verdict(checks: Iterable[Check], console: Console) -> int:
    """The closing line, and the exit code."""
    missing = [check.name for check in checks if check.status == "missing"]
    if missing:
        console.print(f"[bold red]Missing:[/] {', '.join(missing)}")
        return 1
    console.print("[green]Everything required is here.[/]")
    return 0


def all_checks() -> list[Check]:
    pins = pinned_versions()
    return [
        check_python(sys.version_info[:3]),
        check_package("torch", pins, "tensors and the process groups of the trainer", any_version=True),
        check_package("megatron-core", pins, "the trainer"),
        check_package("sglang", pins, "the rollout engine"),
        check_package("transformers", pins, "tokenizers and configurations"),
        check_package("math-verify", pins, "judges mathematical answers"),
        check_gpu(gpu_names()),
        check_driver(driver_version(), torch.version.cuda),
        check_nvcc(),
        check_shared_memory(shared_memory_bytes()),
        check_transformer_engine(),
        check_glibc(os.confstr("CS_GNU_LIBC_VERSION")),
        check_nccl(),
        check_sandbox("bwrap"),
        check_compilers(),
        check_slurm(),
        check_port(),
        check_disk(shutil.disk_usage(".").free / 2**30),
        check_memory(psutil.virtual_memory().available / 2**30),
        check_cores(usable_cores()),
    ]


def pinned_versions() -> dict[str, str]:
    """Package -> version as setup.py pins it, read from our installed metadata; empty in a tree never installed."""
    try:
        requirements = importlib.metadata.requires("megatron_rl") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    matches = (re.match(r"([\w.-]+)(?:\[[^]]*\])?==([\w.]+)", requirement) for requirement in requirements)
    return {match[1].lower().replace("_", "-"): match[2] for match in matches if match}


def check_python(version: tuple[int, ...]) -> Check:
    status: Status = "ok" if version[:2] == (3, 12) else "missing"
    return Check("Python 3.12", status, ".".join(map(str, version)), "megatron-core 0.19 and SGLang 0.5 meet there",
                 "make setup (builds .venv with a Python 3.12)")


def check_package(name: str, pins: dict[str, str], purpose: str, *, any_version: bool = False) -> Check:
    """Installed, and at the pinned version; any_version: another one works, and is only pointed out."""
    version, pin = package_version(name), pins.get(name)
    if version is None:
        return Check(name, "missing", "not installed", purpose, "make setup")
    if pin is None or version.split("+")[0] == pin:
        return Check(name, "ok", version, purpose)
    status: Status = "optional" if any_version else "missing"
    return Check(name, status, f"{version}, tested with {pin}", purpose, f"make setup (installs {name} {pin})")


def check_gpu(names: list[str]) -> Check:
    purpose = "larger models; small ones train on the CPU"
    if not names:
        build = torch.version.cuda or "none"
        return Check("GPU", "optional", f"none visible (torch built for CUDA {build})", purpose,
                     "an NVIDIA GPU and its driver, then make setup")
    return Check("GPU", "ok", f"{len(names)} x {names[0]}", purpose)


def check_driver(driver: str | None, cuda: str | None) -> Check:
    purpose = "lets torch see the GPUs; with one that is too old everything runs on the CPU"
    if driver is None:
        return Check("GPU driver", "optional", "no nvidia-smi that answers", purpose,
                     "NVIDIA's driver, on a GPU machine")
    fault = driver_fault(driver, cuda)
    return Check("GPU driver", "missing" if fault else "ok", fault or driver, purpose, "update the driver")


def check_nvcc() -> Check:
    """Required if there is a GPU."""
    home, purpose = cuda_home(), "compiles the engine's kernels on a GPU when it starts"
    if home is not None:
        return Check("nvcc", "ok", str(home / "bin" / "nvcc"), purpose)
    return Check("nvcc", "missing" if torch.cuda.is_available() else "optional",
                 "not in CUDA_HOME, PATH, this environment or /usr/local/cuda", purpose, "make setup VARIANT=gpu")


def check_shared_memory(free_bytes: int) -> Check:
    """A write beyond it ends the writer with SIGBUS."""
    needed = RolloutConfig().bucket_bytes
    return Check("/dev/shm", "ok" if free_bytes >= needed else "optional", f"{free_bytes / 2**20:.0f} MiB free",
                 "rollout.publish=tensor and NCCL; small models need little",
                 f"{needed / 2**20:.0f} MiB for a bucket of weights: docker run --shm-size=16g, or a smaller "
                 "rollout.bucket_bytes")


def check_transformer_engine() -> Check:
    installed, fault = transformer_engine()
    purpose = "model.backend=transformer_engine; nothing else needs it"
    if fault is not None:
        return Check("Transformer Engine", "missing", f"installed in part: {fault}",
                     "Megatron cannot be imported beside half of it", "make setup VARIANT=gpu TE=1, or pip uninstall "
                     "transformer-engine transformer-engine-cu13 transformer-engine-torch")
    if not installed:
        return Check("Transformer Engine", "optional", "not installed", purpose,
                     "make setup VARIANT=gpu TE=1 (compiles)")
    return Check("Transformer Engine", "ok", package_version("transformer-engine") or "found", purpose)


def check_glibc(found: str | None) -> Check:
    """found: as confstr names it, glibc 2.36."""
    version = re.fullmatch(r"glibc (\d+)\.(\d+)", found or "")
    status: Status = "ok" if version and (int(version[1]), int(version[2])) >= (2, 34) else "missing"
    return Check("glibc", status, found or "another C library", "the engine's wheels need 2.34",
                 "Ubuntu 22.04, Debian 12, RHEL 9 or later, or a container of one")


def check_nccl() -> Check:
    purpose = "communication between GPUs; CPU ranks use gloo"
    if not torch.cuda.is_available():
        return Check("NCCL", "optional", "not usable without a GPU", purpose, "comes with torch on a GPU machine")
    if not torch.distributed.is_nccl_available():
        return Check("NCCL", "missing", "this torch has none", purpose, "make setup")
    return Check("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())), purpose)


def check_sandbox(command: str) -> Check:
    """Makes a sandbox, because a container may hold bubblewrap and forbid what it does."""
    purpose = "runs generated code (code rewards)"
    try:
        Bubblewrap(command).check()
    except RuntimeError as error:
        return Check("sandbox", "optional", str(error).partition(";")[0], purpose, GET_IT)
    return Check("sandbox", "ok", f"{command} runs", purpose)


def check_compilers() -> Check:
    """What programs in the sandbox are compiled and run with: those of the system, under /usr."""
    lacking = [language.needs for language in LANGUAGES.values()
               if shutil.which(Path(language.needs).name, path="/usr/bin:/bin:/usr/local/bin") is None]
    found = f"no {', '.join(lacking)}" if lacking else "python3, g++, javac"
    return Check("compilers", "optional" if lacking else "ok", found, "code rewards in Python, C++ and Java",
                 "apt-get install python3 g++ default-jdk-headless")


def check_slurm() -> Check:
    path = shutil.which("sbatch")
    return Check("Slurm", "ok" if path else "optional", path or "no sbatch", "launching on a cluster",
                 "run from a cluster's login node; one machine needs none")


def check_port() -> Check:
    purpose = "the trainer speaks HTTP to the engine on 127.0.0.1"
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return Check("loopback port", "ok", f"could bind {listener.getsockname()[1]}", purpose)
    except OSError as error:
        return Check("loopback port", "missing", str(error), purpose, "allow binding to 127.0.0.1")


def check_disk(free_gb: float) -> Check:
    status: Status = "ok" if free_gb >= NEEDED_DISK_GB else "missing"
    return Check("free disk", status, f"{free_gb:.0f} GB here", "checkpoints and logs",
                 f"free {NEEDED_DISK_GB} GB, or set run.dir elsewhere")


def check_memory(available_gb: float) -> Check:
    status: Status = "ok" if available_gb >= NEEDED_MEMORY_GB else "missing"
    return Check("memory", status, f"{available_gb:.1f} GB available", "engine and trainer side by side",
                 f"{NEEDED_MEMORY_GB} GB for the quick start: close other programs")


def check_cores(cores: int) -> Check:
    return Check("cores", "ok" if cores >= 2 else "optional", str(cores), "engine and trainer at the same time",
                 "a second core; one works, slower")


if __name__ == "__main__":
    sys.exit(run_doctor())
