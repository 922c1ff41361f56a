"""What of a bailing_moe_v2 or deepseek_v3 no gradient moves: the experts' biases, in float32 whatever the dtype, and
layers behind the last, which pass through untouched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl import topology
from megatron_rl.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rl.model.architectures import parse_config, read_config
from megatron_rl.model.backend import check_backend
from megatron_rl.model.build import build_policy
from megatron_rl.model.convert import Exporter, load_hf
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.hf_folder import HFReader, check_checkpoint
from megatron_rl.recipes.convert import digest
from megatron_rl.trainer.export import export
from tests.megatron_rl.model.test_checkpoint import Run
from tests.tiny_models import write_tiny_bailing, write_tiny_known

BEHIND = "model.layers.2."
SMALL = {"hidden_size": 32, "moe_intermediate_size": 16}


@pytest.fixture
def ranks() -> Iterator[None]:
    yield
    topology.stop()


def bfloat16_folder(path: Path) -> Path:
    """Two layers and one behind them, in bfloat16 but for what is float32 in published checkpoints; one odd one out."""
    folder = write_tiny_bailing(path, "bailing_moe_v2", torch_dtype="bfloat16", num_nextn_predict_layers=1, **SMALL)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{BEHIND}eh_proj.weight"] = tensors[f"{BEHIND}eh_proj.weight"].float() / 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def deepseek_folder(path: Path) -> Path:
    """The same of a deepseek_v3, which lays a copy of the embedding and the head there too."""
    write_tiny_known(path, "deepseek_v3")
    raw, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    tensors = {name: tensor.float() if name.endswith("correction_bias") else tensor.bfloat16()
               for name, tensor in tensors.items()}
    behind = {name.replace("layers.1.", "layers.2."): tensor / 3 for name, tensor in tensors.items() if ".1." in name}
    behind |= {f"{BEHIND}{name}.weight": tensors[f"{copied}.weight"].float() / 3 for name, copied in (
        ("eh_proj", "lm_head"), ("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head"))}
    save_file({**behind, **tensors}, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({**raw, "dtype": "bfloat16", "num_nextn_predict_layers": 1}))
    return path


@pytest.mark.parametrize("folder", [bfloat16_folder, deepseek_folder])
def test_a_bfloat16_round_trip_returns_biases_and_layers_behind_the_last_bit_for_bit(tmp_path, ranks, folder):
    source = folder(tmp_path / "source")
    here = topology.start(ParallelConfig(), seed=0)
    options = ModelConfig(path=str(source), dtype="bfloat16")
    policy = build_policy(read_config(source), options, ParallelConfig(), with_gradients=True)
    load_hf(policy, here, source)
    export(Config(model=options), Exporter(policy, here), here, tmp_path / "written")
    before, after = HFReader(source), HFReader(tmp_path / "written")
    behind = {name for name in before.names if name.startswith(BEHIND)}
    assert len(behind) > 35 and before.dtype(f"{BEHIND}eh_proj.weight") == "F32"
    assert {after.dtype(name) for name in after.names if name.endswith("_bias")} == {"F32"}
    assert {name: digest(after.get(name)) for name in after.names} == {
        name: digest(before.get(name)) for name in before.names}


def test_layers_behind_the_last_need_the_key_that_says_so(tmp_path):
    folder = bfloat16_folder(tmp_path)
    check_checkpoint(read_config(folder), HFReader(folder))
    raw = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    with pytest.raises(ValueError, match=f"unexpected {BEHIND}attention.dense.weight"):
        check_checkpoint(parse_config(raw, "here"), HFReader(folder))


def test_a_layer_behind_the_last_that_is_not_there_is_missed_by_the_key_that_trains_it(tmp_path):
    folder = bfloat16_folder(tmp_path)
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items()
               if not name.startswith(BEHIND)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_checkpoint(read_config(folder), HFReader(folder))
    with pytest.raises(ValueError, match=f"missing {BEHIND}input_layernorm.weight .32., which model.mtp=true trains"):
        check_checkpoint(read_config(folder), HFReader(folder), mtp=True)


def test_a_checkpoint_brings_back_the_biases_that_it_was_saved_with(tmp_path, ranks):
    model = write_tiny_bailing(tmp_path / "model", "bailing_moe_v2", **SMALL)
    run = Run(model, tmp_path)
    for router in run.policy.routers:
        router.move_expert_bias(torch.arange(8.0), rate=0.25)
    saved = [router.expert_bias.clone() for router in run.policy.routers]
    run.saves.save(1, {})
    for router in run.policy.routers:
        router.expert_bias.zero_()
    run.saves.restore(run.saves.folder / "step_00000001")
    assert len(saved) == 2
    for bias, router in zip(saved, run.policy.routers, strict=True):
        assert torch.equal(bias, router.expert_bias)
    bias = load_file(model / "model.safetensors")["model.layers.0.mlp.gate.expert_bias"]
    moved = torch.tensor([0.25] * 4 + [-0.25] * 4)  # loads 0..7, mean 3.5
    assert torch.equal(saved[0], bias + moved)


def test_a_rate_without_a_bias_is_named():
    options = ModelConfig(path="here", expert_bias_rate=0.001)
    plain = parse_config({"model_type": "qwen3_moe", **FAMILIES["qwen3_moe"].tiny}, "here")
    with pytest.raises(ValueError, match="model.expert_bias_rate=0.001: this qwen3_moe network has no expert bias"):
        check_backend(options, plain, ParallelConfig(), gpu=False)
