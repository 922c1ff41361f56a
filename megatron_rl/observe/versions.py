"""What a result was made with: versions of the software, state of the source, the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_rl.config.resources import SOURCE_TREE

PACKAGES = (
    "torch", "megatron-core", "sglang", "transformers", "transformer-engine", "numpy", "hydra-core", "wandb",
    "math-verify", "reasoning-gym",
)


def collect_versions() -> dict[str, Any]:
    """JSON-able: {"python", "packages": {name: version | None}, "git": {...} | None, "machine": {...}}."""
    return {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git": git_state(SOURCE_TREE) if SOURCE_TREE else None,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_model(),
            "cores": usable_cores(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": gpu_names(),
        },
    }


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(directory: Path) -> dict[str, Any] | None:
    """{"commit", "modified"} of the source tree, or None where there is no git or no commit."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(directory), *arguments], check=True, capture_output=True,
                              text=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": git("status", "--porcelain") != ""}
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    """The processor's name from /proc/cpuinfo, or the architecture."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def usable_cores() -> int:
    """Cores this process may run on (its affinity), not those of the machine."""
    return len(os.sched_getaffinity(0))


def gpu_names() -> list[str]:
    """Names of the visible CUDA devices, in order; empty without one."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
