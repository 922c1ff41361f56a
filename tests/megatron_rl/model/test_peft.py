"""An adapter folder loads with peft and gives the logits of the merged weights, family by family, or it is one that
a run says peft does not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.schema import ModelConfig
from megatron_rl.model.adapter_folder import why_not_peft, write_adapter_folder
from megatron_rl.model.adapters import adapter_slots, matrix_slots
from megatron_rl.model.architectures import read_config
from tests.tiny_models import write_tiny_known

ROOT = Path(__file__).resolve().parents[3]
TOKENS = [3, 14, 15, 9, 26, 5, 35, 8]
CASES = {
    "llama": LoraConfig(rank=3, targets=("linear_qkv", "linear_fc2")),
    "qwen2": LoraConfig(rank=4),
    "qwen3": LoraConfig(rank=4),
    "qwen3_moe": LoraConfig(rank=4),
    "qwen3_moe.shared": LoraConfig(rank=4, experts="shared_outer"),
    "qwen3_moe.none": LoraConfig(rank=4, experts="none"),
    "qwen3_moe.down": LoraConfig(rank=4, targets=("linear_qkv", "linear_fc2")),
    "qwen2_moe.none": LoraConfig(rank=4, experts="none"),
    "deepseek_v2.attention": LoraConfig(rank=4, targets=("linear_q_proj", "linear_kv_down_proj", "linear_kv_up_proj",
                                                         "linear_proj")),
    "deepseek_v3.query": LoraConfig(rank=4, targets=("linear_q_down_proj", "linear_q_up_proj", "linear_proj")),
    "glm4_moe.attention": LoraConfig(rank=4, targets=("linear_qkv", "linear_proj")),
}
NOT_LOADED = {
    "qwen3_moe.up": LoraConfig(rank=4, targets=("linear_qkv", "linear_fc1")),
    "qwen2_moe": LoraConfig(rank=4),
    "deepseek_v2": LoraConfig(rank=4, targets=("linear_proj", "linear_fc1", "linear_fc2")),
    "glm4_moe": LoraConfig(rank=4),
    "glm4_moe.none": LoraConfig(rank=4, experts="none"),
}
"""peft 0.21.2 loads qwen2_moe, deepseek_v2 and glm4_moe without a warning, and says of the other two that keys are
missing."""


@pytest.fixture(scope="module")
def logits(tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]]:
    """By case: logits with the adapter folder, of the merged weights, of the base, and what peft says is missing."""
    folder = tmp_path_factory.mktemp("peft")
    pairs, merged = [], []
    for name, lora in {**CASES, **NOT_LOADED}.items():
        base = folder / name / "base"
        write_tiny_known(base, name.partition(".")[0], seed=1, **({"q_lora_rank": 24} if ".query" in name else {}))
        network = read_config(base)
        assert (why_not_peft(network, lora) is None) == (name in CASES), name
        generator = torch.Generator().manual_seed(4)
        matrices = {key: torch.randn(shape, generator=generator) * 0.2 for slot in matrix_slots(network, lora).values()
                    for key, shape in slot.shapes.items()}
        write_adapter_folder(folder / name / "adapter", ModelConfig(path=str(base), lora=lora), network,
                             matrices.items())
        pairs += [str(base), str(folder / name / "adapter")]
        merged.append(str(_write_merged(base, folder / name / "merged", network, lora, matrices)))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    for module, out, arguments in (("tests.peft_logits", "peft.pt", pairs),
                                   ("tests.transformers_logits", "merged.pt", merged)):
        done = subprocess.run([sys.executable, "-m", module, str(folder / out), json.dumps(TOKENS), *arguments],
                              cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    by_peft, by_merged = torch.load(folder / "peft.pt"), torch.load(folder / "merged.pt")
    found = {}
    for name, adapter, whole in zip({**CASES, **NOT_LOADED}, pairs[1::2], merged, strict=True):
        adapted, base, missing = by_peft[adapter]
        found[name] = (adapted, by_merged[whole], base, missing)
    return found


def _write_merged(base: Path, folder: Path, network, lora: LoraConfig, matrices: dict[str, torch.Tensor]) -> Path:
    tensors = load_file(base / "model.safetensors")
    for each in adapter_slots(network, lora):
        for name, b in zip(each.base.names, each.b.names, strict=True):
            tensors[name] = tensors[name] + lora.scale * matrices[b] @ matrices[each.a.key]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


@pytest.mark.parametrize("name", CASES)
def test_logits_by_peft_are_those_of_the_merged_weights(logits, name):
    adapted, merged, base, missing = logits[name]
    scale = float(merged.abs().max())
    assert not missing and float((adapted - merged).abs().max()) < 2e-5 * scale
    assert float((adapted - base).abs().max()) > 0.05 * scale


@pytest.mark.parametrize("name", NOT_LOADED)
def test_peft_gives_other_logits_for_the_folders_that_a_run_warns_of(logits, name):
    adapted, merged, *_ = logits[name]
    assert float((adapted - merged).abs().max()) > 0.05 * float(merged.abs().max())
