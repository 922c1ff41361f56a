"""RL with the layer behind the last trained beside it, through the command line on a real engine: what is published is
proven, and what is exported, resumed and dumped has the layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.model.architectures import read_config
from megatron_rl.model.slots import expected_shapes
from megatron_rl.observe.jsonl import read_jsonl
from tests.engine.test_lora import in_two_layouts, megatron_rl
from tests.engine.test_runs import SMALL
from tests.tiny_models import write_tiny_bailing

pytestmark = pytest.mark.slow
OPTIONS = [*SMALL, "model.mtp=true", "run.save_every_steps=1", "eval.every_steps=100", "run.dump_steps=[2]",
           "run.steps=3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_bailing(tmp_path_factory.mktemp("mtp") / "model", "bailing_moe_v2", num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory) -> Path:
    return in_two_layouts(model, tmp_path_factory.mktemp("mtp") / "run", *OPTIONS)


def test_every_publish_is_proven_and_the_loss_is_told(run_dir):
    """The engine's model drops the layer, so its checksums are those of the others."""
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert len(rows) == 3
    assert all(row["sync/engines_verified"] == 1 for row in rows)
    assert all(row["train/mtp_loss"] > 1 and row["train/mtp_grad_norm"] > 0 for row in rows)


def test_the_exported_layer_is_the_trained_one(run_dir, model):
    before, after = (load_file(folder / "model.safetensors") for folder in (model, run_dir / "hf"))
    assert before.keys() == after.keys()
    network = read_config(model)
    behind = expected_shapes(network, mtp=True).keys() - expected_shapes(network).keys()
    assert len(behind) > 20
    for name in behind:
        assert torch.equal(before[name], after[name]) == name.endswith("expert_bias"), name


def test_a_dumped_step_is_replayed_bit_for_bit(run_dir):
    done = megatron_rl("replay-step", str(run_dir / "dumps" / "step_00000002"))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_checkpoint_with_the_layer_does_not_go_on_without_it(run_dir, model):
    done = megatron_rl("rl", *OPTIONS, f"model.path={model}", f"run.dir={run_dir}", "run.steps=4", "resume=true",
                       "run.accept_changes=true", "model.mtp=false")
    assert done.returncode != 0 and "holds a trained layer behind the last: set model.mtp=true" in done.stderr


@pytest.mark.parametrize("layout", ["ep2", "tp2"])
def test_a_round_trip_returns_it_by_sha256(model, tmp_path, layout):
    done = megatron_rl("convert", "roundtrip", f"model.path={model}", f"parallel={layout}", "model.mtp=true",
                       f"run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
