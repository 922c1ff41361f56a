"""The command line, the environment and the key of an SGLang server (0.5.23), from the configuration."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

import megatron_rl
from megatron_rl.compat.cuda import SAME_IN_RANKS_AND_ENGINES, cuda_home
from megatron_rl.config.orchestrator import RUN_KEY
from megatron_rl.config.rollout import ENGINE_KEY, EngineConfig, RolloutConfig, is_loopback
from megatron_rl.rollout.ports import choose_port

# torchrun's variables would make the engine join the trainer's store instead of opening its own
# (torch.distributed.rendezvous._torchelastic_use_agent_store).
TRAINER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
                     "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def check_gpus(engine: EngineConfig, number: int) -> None:
    """ValueError if this machine has too few GPUs for the server `number`."""
    needed, found = engine.first_gpu + (number + 1) * engine.tp, torch.cuda.device_count()
    if engine.tp > 1 and resolve_device(engine.device) == "cpu":
        raise ValueError(f"rollout.engine.tp={engine.tp} shares a model among GPUs, and this machine has none: "
                         "leave it at 1")
    if resolve_device(engine.device) == "cuda" and needed > found:
        raise ValueError(f"rollout.engine.count={engine.count} engines of rollout.engine.tp={engine.tp} GPUs from "
                         f"rollout.engine.first_gpu={engine.first_gpu} on need {needed} GPUs, this machine has {found}")


def engine_command(
    engine: EngineConfig, rollout: RolloutConfig, model_path: str | Path, port: int, *,
    model_dtype: Literal["float32", "bfloat16"] = "float32", seed: int = 0, weight_version: int = 0,
    return_routed_experts: bool = False, number: int = 0, fp32_lm_head: bool = True,
    adapters: tuple[int, Sequence[str]] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The command line and the whole environment of a server. number: its place on its machine, from 0.

    - `engine.dtype` overrides `model_dtype`.
    - `seed` seeds SGLang's own sampler, which is reproducible only if requests arrive in the same order. With
      `engine.deterministic` it depends on each request's seed alone.
    - return_routed_experts: keep the experts that tokens take, for requests that ask for them.
    - adapters: the rank of the adapters that are loaded later, and the modules beside which they stand.
    - fp32_lm_head: logits are float32 (on CUDA out of the matrix units, on a CPU by widening the head at each step).
    """
    device = resolve_device(engine.device)
    environment = _engine_environment(engine, device, port)
    # One request at a time: on CPU the last bits of a matmul depend on how many rows it has. On CUDA SGLang's
    # own batch-invariant kernels make that unnecessary.
    alone = engine.deterministic and device == "cpu"
    flags = {
        "--model-path": str(model_path),
        "--host": engine.host,
        "--port": port,
        "--device": device,
        "--dtype": engine.dtype or model_dtype,
        "--context-length": rollout.engine_context_tokens,
        "--max-running-requests": 1 if alone else engine.max_running_requests,
        "--mem-fraction-static": engine.mem_fraction_static,
        "--random-seed": seed,
        "--weight-version": weight_version,
        "--log-level-http": "warning",
    }
    switches = ["--trust-remote-code", "--sleep-on-idle"]
    if engine.max_total_tokens is not None:
        flags["--max-total-tokens"] = engine.max_total_tokens
    if engine.deterministic:
        switches.append("--enable-deterministic-inference")
    if fp32_lm_head:
        switches.append("--enable-fp32-lm-head")
    if adapters is not None:
        # of a batch: the newest, and none for the server's own health request
        flags |= {"--max-lora-rank": adapters[0], "--max-loras-per-batch": 2}
        switches += ["--enable-lora", "--lora-target-modules", *adapters[1]]
        if device == "cpu":
            flags["--lora-backend"] = "torch_native"
    if return_routed_experts:
        switches.append("--enable-return-routed-experts")
    if alone:
        # Whole prompts. -1 means that too, but RoutedExpertsCapturer (sglang 0.5.23) takes it for a buffer's length.
        flags["--chunked-prefill-size"] = rollout.max_context_tokens
        switches.append("--disable-radix-cache")
    if device == "cpu":
        flags |= {"--attention-backend": "torch_native", "--sampling-backend": "pytorch"}
        switches.append("--disable-overlap-schedule")
    else:
        flags |= {"--tp-size": engine.tp, "--base-gpu-id": engine.first_gpu + number * engine.tp}
        if engine.colocate:
            switches.append("--enable-memory-saver")
    argv = [sys.executable, "-m", "megatron_rl.compat.sglang_key"]
    for name, value in flags.items():
        argv += [name, str(value)]
    return [*argv, *switches, *engine.extra_args], environment


def engine_key(engine: EngineConfig) -> str:
    """The key that requests to the engines carry. ValueError if the variable that should hold it is not set."""
    key = os.environ.get(engine.api_key_env)
    if not key:
        raise ValueError(f"rollout.engine.api_key_env={engine.api_key_env}: that environment variable is not set; it "
                         "must hold the key with which the servers at rollout.engine.urls were started (--api-key). "
                         "Without a key any user who reaches a server could give it other weights")
    return key


def draw_key(engine: EngineConfig) -> None:
    """Draws the key of the engines that we start, unless the user gave one.

    It puts the key into this process's environment. Engines and ranks inherit it from there.
    """
    if engine.api_key_env == ENGINE_KEY and not engine.urls:
        os.environ.setdefault(ENGINE_KEY, secrets.token_hex(32))


def _engine_environment(engine: EngineConfig, device: str, port: int) -> dict[str, str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in (*TRAINER_VARIABLES, ENGINE_KEY, RUN_KEY) and not name.startswith("TORCHELASTIC_")
    }
    environment[ENGINE_KEY] = engine_key(engine)
    if is_loopback(engine.host):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment.setdefault("SGLANG_HOST_IP", engine.host)  # where SGLang has its global store
    else:  # its ranks are on one machine, whatever address it serves: their stores stay on loopback (loopback_store.py)
        store = f"tcp://127.0.0.1:{choose_port(None, [port])}"
        environment.setdefault("SGLANG_HOST_IP", "127.0.0.1")
        environment.setdefault("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", store)
    source_root = str(Path(megatron_rl.__path__[0]).resolve().parent)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = source_root if inherited is None else source_root + os.pathsep + inherited
    environment["HF_HUB_OFFLINE"] = "1"
    environment["OMP_NUM_THREADS"] = str(engine.threads)
    # ENGINE_KEEPS positions more than max_position_embeddings may be asked for; no token is ever placed there.
    environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    if device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch uses huge pages: a bucket's memory is there sooner
        return environment
    environment = SAME_IN_RANKS_AND_ENGINES | environment
    if (home := cuda_home()) is not None:  # what it compiles its kernels with
        environment["CUDA_HOME"] = str(home)
        environment["PATH"] = f"{home / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
    return environment
