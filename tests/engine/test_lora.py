"""RL with adapters through the command line: real Megatron ranks, a real engine that proves what it was sent, a resume
in another layout, and a dumped step again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config.load import build
from megatron_rl.launch.local import rank_environment
from megatron_rl.model.adapter_folder import read_adapters
from megatron_rl.model.adapters import adapter_slots
from megatron_rl.model.architectures import read_config
from megatron_rl.observe.jsonl import read_jsonl
from tests.engine.test_runs import SMALL

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["model.lora.rank=8", "optimizer.lr=2e-2", "optimizer.warmup_steps=0", "algo.loss.kl_coef=0.01",
           "run.save_every_steps=1", "eval.every_steps=100", "run.dump_steps=[2]", "run.steps=3"]


def megatron_rl(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "megatron_rl.cli", *arguments], cwd=ROOT, env=rank_environment(),
                          capture_output=True, text=True, timeout=900)


def in_two_layouts(model: Path, folder: Path, *options: str) -> Path:
    """Two steps on two expert-parallel ranks, the rest on two tensor-parallel ones; the run's folder, which is new."""
    for more in (["run.steps=2"], ["parallel=tp2", "resume=true"]):
        done = megatron_rl("rl", *options, f"model.path={model}", f"run.dir={folder}", *more)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory) -> Path:
    return in_two_layouts(model, tmp_path_factory.mktemp("lora") / "run", *SMALL, *OPTIONS)


def test_every_publish_of_merged_weights_is_proven_by_the_engines_checksums(run_dir):
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert len(rows) == 3
    assert all(row["sync/engines_verified"] == 1 for row in rows)
    assert all(row["train/trained_share"] == pytest.approx(rows[0]["train/trained_share"]) for row in rows)


def test_the_reference_of_the_kl_term_is_the_policy_without_adapters(run_dir):
    """The two are one network until the first optimiser step."""
    first, *later = [row["train/kl"] for row in read_jsonl(run_dir / "metrics.jsonl")]
    assert first == pytest.approx(0.0, abs=1e-10)
    assert min(later) > 1e-6


def test_the_folder_of_weights_is_the_base_plus_what_the_adapter_folder_adds(run_dir, model):
    config = build(json.loads((run_dir / "config.json").read_text())).model
    object.__setattr__(config.lora, "path", str(run_dir / "adapter"))
    network = read_config(model)
    base, merged = load_file(model / "model.safetensors"), load_file(run_dir / "hf" / "model.safetensors")
    matrices, expected = read_adapters(config, network), dict(base)
    for each in adapter_slots(network, config.lora):
        b = torch.cat([matrices[name] for name in each.b.names]).double()
        whole = torch.cat([base[name] for name in each.base.names]).double()
        sizes = [base[name].shape[0] for name in each.base.names]
        whole = whole + config.lora.scale * b @ matrices[each.a.key].double()
        expected |= dict(zip(each.base.names, whole.split(sizes), strict=True))
    moved = [name for name in base if not torch.equal(base[name], merged[name])]
    assert len(moved) > 20 and not any("mlp.gate." in name or "norm" in name or "embed" in name for name in moved)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name].double(), tensor.double(), rtol=1e-5, atol=1e-6)


def test_an_adapter_folder_is_merged_into_the_folder_that_the_run_wrote(run_dir, model, tmp_path):
    """Byte for byte, in another layout."""
    options = [f"model.path={model}", "model.lora.rank=8", f"model.lora.path={run_dir / 'adapter'}"]
    done = megatron_rl("convert", "merge", *options, f"run.dir={tmp_path}", "parallel=tp2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (run_dir / "hf" / "model.safetensors").read_bytes()


def test_a_run_begins_with_an_adapter_folder_and_its_reference_is_the_base(run_dir, model, tmp_path):
    done = megatron_rl("rl", *SMALL, *OPTIONS, f"model.path={model}", f"model.lora.path={run_dir / 'adapter'}",
                       f"run.dir={tmp_path}", "run.steps=1", "run.dump_steps=[1]")
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["sync/engines_verified"] == 1 and row["train/kl"] > 1e-6
    start, given = (load_file(folder / "adapter" / "adapter_model.safetensors")
                    for folder in (tmp_path / "dumps" / "step_00000001", run_dir))
    assert start.keys() == given.keys() and all(torch.equal(start[name], given[name]) for name in given)


def test_a_dumped_step_holds_the_adapters_and_is_replayed_bit_for_bit(run_dir):
    dumped = run_dir / "dumps" / "step_00000002"
    assert (dumped / "adapter" / "adapter_model.safetensors").is_file() and not (dumped / "weights").exists()
    done = megatron_rl("replay-step", str(dumped))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_checkpoint_of_adapters_does_not_go_on_without_them_or_with_others(run_dir, model):
    for change, words in (("model.lora.rank=0", "holds adapters alone: set model.lora.rank=8"),
                          ("model.lora.rank=4", "model.lora.rank=4, and")):
        done = megatron_rl("rl", *SMALL, *OPTIONS, f"model.path={model}", f"run.dir={run_dir}", "run.steps=4",
                           "resume=true", "run.accept_changes=true", change)
        assert done.returncode != 0 and words in done.stderr, done.stderr[-2000:]
