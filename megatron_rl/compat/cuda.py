"""What a machine with NVIDIA GPUs must have beside the wheels: a driver, a compiler for the engine, a whole Transformer
Engine or none.

Written for torch 2.14.1 (CUDA 13), SGLang 0.5.23 and Transformer Engine 2.20.2. Only facts here; who needs them refuses
(preflight_gpu.py) or shows them (doctor.py). Delete what the packages come to say themselves.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

OLDEST_DRIVER = {12: 525, 13: 580}
"""CUDA major version -> the first NVIDIA driver that runs programs built for it."""
SYSTEM_TOOLKIT = Path("/usr/local/cuda")
SAME_IN_RANKS_AND_ENGINES = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""SGLang sets these to 0 if nobody did (srt/entrypoints/engine.py: _set_envs_and_config), NCCL's own defaults differ,
and all members of a group must agree. A value in the environment goes to both sides."""


def driver_version() -> str | None:
    """As nvidia-smi tells it, such as 570.86.10; None without a driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    done = subprocess.run([command, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                          text=True)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def driver_fault(driver: str | None, cuda: str | None) -> str | None:
    """Why torch, built for `cuda` (13.0), cannot use this driver; None if it can, or if one of them is not there.

    torch itself only warns, and everything runs on the CPU.
    """
    if driver is None or cuda is None:
        return None
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if oldest is None or int(driver.split(".")[0]) >= oldest:
        return None
    return (f"the NVIDIA driver {driver} is too old for CUDA {cuda}, for which torch is built: that takes {oldest} or "
            "later")


def cuda_home() -> Path | None:
    """The CUDA toolkit whose bin/nvcc the engine compiles its run-time kernels with, or None.

    In this order: CUDA_HOME, the environment's own nvidia-cuda-nvcc, the PATH, /usr/local/cuda. An nvcc that has no
    headers beside it, such as a script that calls another one, is none.
    """
    named, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    candidates = [*([Path(named)] if named else []), Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13",
                  *([Path(on_path).resolve().parents[1]] if on_path else []), SYSTEM_TOOLKIT]
    return next((home for home in candidates if os.access(home / "bin" / "nvcc", os.X_OK)
                 and (home / "include" / "cuda_runtime.h").is_file()), None)


def shared_memory_bytes() -> int:
    """What is free in /dev/shm. A write beyond it ends the writer with SIGBUS."""
    state = os.statvfs("/dev/shm")
    return state.f_bavail * state.f_frsize


def transformer_engine() -> tuple[bool, str | None]:
    """(it is installed, why it cannot be imported or None).

    Half of it is worse than none: megatron.core.optimizer looks for it and dies of a FileNotFoundError when the part
    for torch is not there.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return False, None
    done = subprocess.run([sys.executable, "-c", "import transformer_engine.pytorch"], capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return True, last if done.returncode else None
