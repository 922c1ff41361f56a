"""Checkpoints as transformers saves them are read by the tables, and the plain-torch reference is the same function."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.model.architectures import read_config
from megatron_rl.model.hf_folder import HFReader, check_checkpoint, write_hf_folder
from megatron_rl.model.slots import expected_shapes
from tests.reference_bailing import bailing_logits
from tests.tiny_models import write_tiny_known

TOKENS = [5, 90, 17, 17, 3, 42, 60, 1, 0, 33, 71, 8]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MODELS = {
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "llama-llama3": {"head_dim": 32, "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 500.0}},
    "qwen2": {},
    "qwen2-yarn": {"rope_parameters": {**YARN, "rope_theta": 500.0}},
    "qwen2_moe": {"shared_expert_intermediate_size": 48},
    "glm4_moe": {"num_hidden_layers": 3, "tie_word_embeddings": False},
    "glm4_moe-groups": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
                        "use_qk_norm": False, "n_shared_experts": 2, "partial_rotary_factor": 0.25},
    "glm4_moe-yarn": {"rope_parameters": {
        **YARN, "rope_theta": 500.0, "partial_rotary_factor": 0.5, "beta_fast": 8, "truncate": False}},
    "deepseek_v2": {},
    "deepseek_v2-yarn": {"num_experts_per_tok": 3, "n_shared_experts": 2, "rope_theta": 500.0, "v_head_dim": 24,
                         "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}},
    "deepseek_v2-groups": {"q_lora_rank": 24, "n_routed_experts": 16, "num_experts_per_tok": 6, "n_group": 8,
                           "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
    "deepseek_v3": {"routed_scaling_factor": 2.446, "num_experts_per_tok": 3, "n_shared_experts": 2},
    "deepseek_v3-groups": {"q_lora_rank": 24, "n_routed_experts": 16, "num_experts_per_tok": 3, "n_group": 4,
                           "topk_group": 2, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0,
                                                                "rope_theta": 500.0}},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 24},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_moe-yarn": {"rope_parameters": {
        **YARN, "rope_theta": 500.0, "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 2.0, "mscale_all_dim": 0.5}},
    "qwen3_moe-plain_gates": {"norm_topk_prob": False},
}
in_models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_tiny_known(root / name, name.split("-")[0], **keys, initializer_range=0.2)
            for name, keys in MODELS.items()}


def config_and_weights(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def logits(folders, tmp_path_factory) -> dict[str, torch.Tensor]:
    """transformers' logits of each folder, and of the same weights as write_hf_folder writes them (NAME-written)."""
    root = tmp_path_factory.mktemp("written")
    shown = dict(folders)
    for name, folder in folders.items():
        config, weights = config_and_weights(folder)
        shown[f"{name}-written"] = write_hf_folder(root / name, config, weights.items())
    subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.transformers_logits", str(root / "logits.pt"),
                    json.dumps(TOKENS), *map(str, shown.values())], check=True, timeout=600)
    found = torch.load(root / "logits.pt")
    return {name: found[str(folder)] for name, folder in shown.items()}


@in_models
def test_tensor_names_and_shapes_are_those_that_transformers_saves(folders, name):
    reader = HFReader(folders[name])
    check_checkpoint(read_config(folders[name]), reader)
    assert reader.names == load_file(folders[name] / "model.safetensors").keys() == set(
        expected_shapes(read_config(folders[name])))


@pytest.mark.slow
@in_models
def test_reference_is_the_function_of_transformers(folders, logits, name):
    config, weights = config_and_weights(folders[name])
    assert logits[name].std() > 0.3
    torch.testing.assert_close(bailing_logits(weights, config, TOKENS), logits[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@in_models
def test_written_folder_is_the_same_model_to_transformers(logits, name):
    assert torch.equal(logits[f"{name}-written"], logits[name])
