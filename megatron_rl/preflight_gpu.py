"""What GPUs ask of a run, looked at before anything starts: every ValueError names the key to change."""

from __future__ import annotations

import os

import torch

from megatron_rl.compat.cuda import cuda_home, driver_fault, driver_version, shared_memory_bytes, transformer_engine
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.model.network import Network
from megatron_rl.model.slots import count_parameters

FLASH_HEAD_DIMS = (64, 96, 128, 192, 256)
"""Head dimensions that SGLang 0.5.23's attention kernels take on CUDA (FlashAttention 3, FlashInfer)."""


def check_gpus_of_run(config: Config, network: Network) -> None:
    """Checks all but the driver, for an RL run whose ranks and engines start on this machine."""
    check_transformer_engine(config.model.backend)
    check_engines(config, network)
    if on_gpus_here(config):
        check_broadcast(config, config.parallel.world_size)
    if not config.rollout.engine.urls:
        check_shared_memory(config, network)


def check_driver() -> None:
    """ValueError if torch cannot see GPUs because their driver is too old. CUDA_VISIBLE_DEVICES= means the CPU."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    fault = driver_fault(driver_version(), torch.version.cuda)
    require(fault is None, f"{fault}; everything would run on the CPU. Update the driver, or say that the CPU is "
                           "meant: CUDA_VISIBLE_DEVICES=")


def check_transformer_engine(backend: str) -> None:
    """ValueError if half of it is installed, or if model.backend asks for it and it is not there."""
    installed, fault = transformer_engine()
    asked = backend == "transformer_engine"
    key = "model.backend=transformer_engine: " if asked else ""
    require(fault is None,
            f"{key}Transformer Engine is installed in part ({fault}), and Megatron cannot be imported beside that: "
            "install it whole (`make setup VARIANT=gpu TE=1`), or remove it: pip uninstall transformer-engine "
            "transformer-engine-cu13 transformer-engine-torch")
    require(installed or not asked,
            f"{key}Transformer Engine is not installed: install it (`make setup VARIANT=gpu TE=1`), use an image that "
            "brings it, or set model.backend=torch")


def check_shared_memory(config: Config, network: Network) -> None:
    """ValueError if a bucket of weights does not fit into /dev/shm."""
    rollout = config.rollout
    if rollout.publish != "tensor":
        return
    largest = min(rollout.bucket_bytes, count_parameters(network)[0] * (4 if config.model.dtype == "float32" else 2))
    free = shared_memory_bytes()
    require(largest <= free,
            f"rollout.publish=tensor puts buckets of {largest / 2**20:.0f} MiB into /dev/shm, where "
            f"{free / 2**20:.0f} MiB are free: lower rollout.bucket_bytes, choose rollout.publish=disk, or give the "
            "container more (docker run --shm-size=16g)")


def on_gpus_here(config: Config) -> bool:
    engine = config.rollout.engine
    return not engine.urls and engine.device != "cpu" and torch.cuda.is_available()


def check_engines(config: Config, network: Network) -> None:
    """ValueError if the engines that we start on this machine's GPUs could not run there."""
    engine = config.rollout.engine
    if not on_gpus_here(config):
        return
    require((engine.dtype or config.model.dtype) != "float32",
            f"{'rollout.engine' if engine.dtype else 'model'}.dtype=float32: SGLang's kernels on CUDA have no float32; "
            "set model.dtype=bfloat16, or run the engines on the CPU with rollout.engine.device=cpu")
    require(network.kv_lora_rank or network.head_dim in FLASH_HEAD_DIMS or "--attention-backend" in engine.extra_args,
            f"model.path: head_dim={network.head_dim}, and the engine's attention kernels on CUDA take "
            f"{', '.join(map(str, FLASH_HEAD_DIMS))}: choose another model, rollout.engine.device=cpu, or a backend "
            "that takes it in rollout.engine.extra_args (--attention-backend)")
    require(cuda_home() is not None,
            "rollout.engine.device=cuda: engines compile kernels when they start, and no nvcc is found in CUDA_HOME, "
            "on the PATH, in this environment or in /usr/local/cuda: `make setup VARIANT=gpu` installs one")


def check_broadcast(config: Config, ranks_here: int) -> None:
    """NCCL takes one process per GPU into a group (it answers "Duplicate GPU detected")."""
    engine = config.rollout.engine
    require(config.rollout.publish != "broadcast" or (not engine.colocate and engine.first_gpu >= ranks_here),
            f"rollout.publish=broadcast with engines on the ranks' own GPUs (rollout.engine.first_gpu="
            f"{engine.first_gpu}, {ranks_here} rank(s) from GPU 0 on): NCCL admits one process for each GPU; set "
            f"rollout.engine.first_gpu={ranks_here}, or rollout.publish=tensor")
