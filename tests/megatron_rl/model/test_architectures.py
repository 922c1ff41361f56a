"""Checkpoints as transformers saves them are read by the tables, and the plain-torch reference is the same function."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.model.architectures import read_config
from megatron_rl.model.hf_folder import HFReader, check_checkpoint, write_hf_folder
from tests.reference_bailing import bailing_logits
from tests.tiny_models import write_tiny_dense_or_moe

TOKENS = [5, 90, 17, 17, 3, 42, 60, 1, 0, 33, 71, 8]
MODELS = {
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "qwen2": {"head_dim": None},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 24},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_moe_plain_gates": {"norm_topk_prob": False},
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    keys = {**MODELS[request.param], "initializer_range": 0.2}
    model_type = request.param.removesuffix("_plain_gates")
    if keys.get("head_dim", 0) is None:
        del keys["head_dim"]
    return write_tiny_dense_or_moe(tmp_path_factory.mktemp("models") / request.param, model_type, **keys)


def config_and_weights(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def test_tensor_names_and_shapes_are_those_that_transformers_saves(folder):
    check_checkpoint(read_config(folder), HFReader(folder))


def test_reference_is_the_function_of_transformers(folder):
    config, weights = config_and_weights(folder)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([TOKENS])).logits[0]
        found = bailing_logits(weights, config, TOKENS)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_written_folder_is_read_by_transformers(folder, tmp_path):
    config, weights = config_and_weights(folder)
    written = write_hf_folder(tmp_path / "again", {**config, "torch_dtype": "float32"}, weights.items())
    loaded = AutoModelForCausalLM.from_pretrained(written)
    assert type(loaded).__name__ == config["architectures"][0]
    with torch.no_grad():
        logits = [model(torch.tensor([TOKENS])).logits for model in
                  (loaded, AutoModelForCausalLM.from_pretrained(folder))]
    assert torch.equal(*logits)
