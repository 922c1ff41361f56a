"""A fake machine of 1, 2 and 8 GPUs x every shipped experiment: refused by a key, or the exact command lines.

tests/golden/gpu_commands.json holds them; after a change that is meant, `python -m tests.gpu.test_commands` writes it
anew. Every engine's line is then read by SGLang's own parser.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import megatron_rl.preflight_gpu as preflight_gpu
from megatron_rl.config.load import load
from megatron_rl.config.rollout import EngineConfig
from megatron_rl.config.schema import Config
from megatron_rl.launch.local import ranks_command
from megatron_rl.model.architectures import HF_FILES, parse_config
from megatron_rl.model.fresh import bailing_config
from megatron_rl.model.network import Network
from megatron_rl.orchestrator import stages
from megatron_rl.preflight import check_devices
from megatron_rl.preflight_gpu import check_gpus_of_run
from megatron_rl.recipes import quickstart
from megatron_rl.rollout.engine_command import check_gpus, engine_command

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "gpu_commands.json"
MACHINES = (1, 2, 8)
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
NODE = ["parallel.world_size=4", "parallel.ep=4", "rollout.engine.first_gpu=4"]
CASES: dict[str, list[str]] = {
    **{name: [f"experiment={name}"] for name in EXPERIMENTS},
    **{f"{name} in bfloat16": [f"experiment={name}", "model.dtype=bfloat16"] for name in EXPERIMENTS
       if not name.startswith(("ring_lite_rl", "ring_mini_2"))},
    "quickstart as `megatron-rl quickstart` runs it": ["experiment=quickstart", "QUICKSTART"],
    "ring_lite_rl_stage1, ranks and engines apart": [
        "experiment=ring_lite_rl_stage1", *NODE, "rollout.engine.count=2", "rollout.engine.tp=2"],
    "ring_lite_rl_stage1, engines on the ranks' GPUs": ["experiment=ring_lite_rl_stage1", "parallel.world_size=8"],
    "ring_lite_rl_stage1, in turns": [
        "experiment=ring_lite_rl_stage1", "parallel.world_size=8", "rollout.engine.count=4", "rollout.engine.tp=2",
        "rollout.engine.colocate=true", "rollout.publish=tensor"],
}


def network_of(config: Config, head_dim: int | None) -> Network:
    if config.model.architecture is not None:
        path = HF_FILES / f"{config.model.architecture}.json"
        return parse_config(json.loads(path.read_text()), str(path))
    sizes = {} if head_dim is None else {"head_dim": head_dim}
    if config.model.path.startswith("models/smollm2"):
        sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    return parse_config(bailing_config(**sizes), "config.json")


def outcome(overrides: list[str], gpus: int) -> dict:
    """{"refused": the ValueError} or {"ranks": line, "engines": [lines]} on a machine of so many GPUs."""
    head_dim = None
    if "QUICKSTART" in overrides:
        head_dim = quickstart.FLASH_HEAD_DIM
        overrides = [*(each for each in overrides if each != "QUICKSTART"), *quickstart.overrides_on(gpus)]
    try:
        config = stages.widest(load(overrides))
        check_devices(config)
        check_gpus_of_run(config, network_of(config, head_dim))
        engine = config.rollout.engine
        lines = []
        for number in range(engine.count):
            check_gpus(engine, number)
            argv, _ = engine_command(engine, config.rollout, config.model.path or "MODEL", 30000 + number,
                                     number=number, model_dtype=config.model.dtype,
                                     fp32_lm_head=config.model.fp32_lm_head,
                                     return_routed_experts=config.algo.router_replay == "rollout")
            lines.append(" ".join(argv[1:]))
    except ValueError as error:
        return {"refused": str(error)}
    ranks = re.sub(r"--master-port=\d+", "--master-port=PORT", " ".join(ranks_command(config)[1:]))
    return {"ranks": ranks, "engines": lines}


def on_fake_machines(patch: pytest.MonkeyPatch) -> Iterator[tuple[str, int, dict]]:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(preflight_gpu, "cuda_home", lambda: Path("/usr/local/cuda"))
    patch.setattr(preflight_gpu, "shared_memory_bytes", lambda: 2**34)
    for gpus in MACHINES:
        patch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        for name, overrides in CASES.items():
            yield name, gpus, outcome(overrides, gpus)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, dict]]:
    """case -> number of GPUs -> outcome."""
    table: dict[str, dict[str, dict]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, gpus, result in on_fake_machines(patch):
            table.setdefault(name, {})[str(gpus)] = result
    return table


def test_outcomes_are_the_recorded_ones(found):
    expected = json.loads(GOLDEN.read_text())
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


def test_every_refusal_names_a_key(found):
    refusals = [result["refused"] for by_gpus in found.values() for result in by_gpus.values() if "refused" in result]
    assert len(refusals) > 20
    for text in refusals:
        assert re.search(r"\b(model|parallel|rollout|slurm)(\.\w+)+", text), text


def test_a_float32_engine_is_refused_wherever_the_ranks_fit(found):
    configs = {name: load([f"experiment={name}"]) for name in EXPERIMENTS}
    plain = [name for name, config in configs.items() if config.model.dtype == "float32"
             and config.parallel.world_size <= 2]
    assert "quickstart" in plain and "smollm2" in plain
    for name in plain:
        for gpus in ("2", "8"):
            assert found[name][gpus]["refused"].startswith("model.dtype=float32"), name


def test_the_quick_start_runs_on_every_machine_with_a_rank_for_a_gpu(found):
    for gpus, result in found["quickstart as `megatron-rl quickstart` runs it"].items():
        assert f"--nproc-per-node={min(2, int(gpus))} " in result["ranks"]
        (line,) = result["engines"]
        assert "--dtype bfloat16" in line and "--enable-fp32-lm-head" in line
        assert f"--base-gpu-id {2 if int(gpus) > 2 else 0} " in line


def test_broadcast_to_engines_on_the_ranks_gpus_is_refused_and_apart_it_is_not(found):
    shared = found["ring_lite_rl_stage1, engines on the ranks' GPUs"]["8"]
    assert "rollout.publish=broadcast with engines on the ranks' own GPUs" in shared["refused"]
    apart = found["ring_lite_rl_stage1, ranks and engines apart"]["8"]["engines"]
    assert [re.search(r"--base-gpu-id (\d)", line)[1] for line in apart] == ["4", "6"]
    assert all("--enable-memory-saver" in line
               for line in found["ring_lite_rl_stage1, in turns"]["8"]["engines"])


def test_an_engine_has_time_to_read_ling_lite_and_to_compile():
    """33.6 GB from a network file system at 50 MB/s, and some minutes for kernels and CUDA graphs."""
    assert EngineConfig().start_timeout_s > 33.6e9 / 50e6 + 300


PARSE = """
import argparse, json, sys
from megatron_rl.compat import sglang_cpu
sglang_cpu.apply()
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
names = ("device", "dtype", "tp_size", "base_gpu_id", "enable_fp32_lm_head", "context_length", "port")
for line in json.load(sys.stdin):
    parsed = vars(parser.parse_args(line.split()[2:]))
    print("PARSED", json.dumps({name: parsed[name] for name in names}))
"""


@pytest.mark.slow
def test_sglangs_own_parser_takes_every_line(found):
    lines = [line for by_gpus in found.values() for result in by_gpus.values() for line in result.get("engines", ())]
    assert len(lines) > 5
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PARSE], input=json.dumps(lines), capture_output=True,
                          text=True, cwd=ROOT, timeout=600,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    parsed = [json.loads(line.removeprefix("PARSED ")) for line in done.stdout.splitlines()
              if line.startswith("PARSED")]
    assert len(parsed) == len(lines)
    for line, values in zip(lines, parsed, strict=True):
        assert values["device"] == "cuda" and values["dtype"] == "bfloat16" and values["enable_fp32_lm_head"]
        for flag, name in (("tp-size", "tp_size"), ("base-gpu-id", "base_gpu_id"), ("port", "port")):
            assert values[name] == int(re.search(rf"--{flag} (\d+)", line)[1])


if __name__ == "__main__":
    os.environ.setdefault("MEGATRON_RL_ENGINE_KEY", "a key")
    table: dict[str, dict[str, dict]] = {}
    with pytest.MonkeyPatch.context() as outside:
        for case, count, found_here in on_fake_machines(outside):
            table.setdefault(case, {})[str(count)] = found_here
    GOLDEN.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
