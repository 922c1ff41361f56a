"""Checkpoints pass through every layout unchanged, and the network they make is the reference's."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.distributed.cases as cases
from tests.distributed.reference_step import token_outputs
from tests.distributed.test_gradients import in_layouts


@in_layouts()
def test_round_trip_returns_every_tensor_bit_for_bit(layouts, layout):
    assert layouts[layout]["loaded"] == {name: cases.sha256(tensor) for name, tensor in layouts.start.items()}


@in_layouts()
def test_passes_without_an_optimiser_step_leave_weights_alone(layouts, layout):
    assert layouts[layout]["after_gradients"] == layouts[layout]["loaded"]


@pytest.mark.parametrize("norm_head", [True, False], ids=["norm_head", "plain_head"])
@in_layouts()
def test_logprobs_equal_the_reference(layouts, layout, norm_head):
    weights = {name: tensor.double() for name, tensor in layouts.start.items()}
    found = layouts[layout]["logprobs"][norm_head]
    assert sorted(found) == list(range(len(layouts.step.token_ids)))
    for index, tokens in enumerate(layouts.step.token_ids):
        with torch.no_grad():
            expected = token_outputs(weights, layouts.configs[norm_head], tokens)[0]
        np.testing.assert_allclose(found[index].double(), expected, rtol=0, atol=1e-5)


def test_norm_head_changes_the_logprobs(layouts):
    found = layouts["one"]["logprobs"]
    assert (found[True][0] - found[False][0]).abs().max() > 0.1


def broken_checkpoint(layouts, folder, change) -> str:
    """A copy of the checkpoint whose tensors went through `change`; the message of its check."""
    from megatron_rl.model.architectures import read_config
    from megatron_rl.model.convert import HFReader, check_checkpoint

    tensors = load_file(layouts.folder / "norm_head_True" / "model.safetensors")
    change(tensors)
    shutil.copy(layouts.folder / "norm_head_True" / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not match its config.json") as raised:
        check_checkpoint(read_config(folder), HFReader(folder))
    assert str(folder) in str(raised.value)
    return str(raised.value)


def test_missing_tensor_is_named(layouts, tmp_path):
    message = broken_checkpoint(layouts, tmp_path, lambda tensors: tensors.pop("model.layers.2.mlp.gate.weight"))
    assert "missing model.layers.2.mlp.gate.weight [4, 32]" in message


def test_unexpected_tensor_is_named(layouts, tmp_path):
    message = broken_checkpoint(layouts, tmp_path, lambda tensors: tensors.update({"model.extra": torch.zeros(1)}))
    assert "unexpected model.extra" in message


def test_wrong_shape_is_named_with_both_shapes(layouts, tmp_path):
    message = broken_checkpoint(layouts, tmp_path, lambda tensors: tensors.update(
        {"lm_head.weight": torch.zeros(65, 32)}))
    assert "lm_head.weight has shape [65, 32], config.json says [64, 32]" in message


def test_long_lists_of_problems_are_cut(layouts, tmp_path):
    def keep_one(tensors):
        for name in set(tensors) - {"lm_head.weight"}:
            del tensors[name]

    message = broken_checkpoint(layouts, tmp_path, keep_one)  # 70 tensors, 69 missing, 20 shown
    assert message.count("missing ") == 20
    assert message.endswith("and 49 more")


def test_dense_layer_of_the_config_wants_dense_tensors(layouts, tmp_path):
    """first_k_dense_replace one higher than the checkpoint's: layer 1 misses its MLP and has experts too many."""
    from megatron_rl.model.architectures import parse_config
    from megatron_rl.model.convert import HFReader, check_checkpoint

    source = layouts.folder / "norm_head_True"
    raw = json.loads((source / "config.json").read_text()) | {"first_k_dense_replace": 2}
    with pytest.raises(ValueError, match="missing model.layers.1.mlp.gate_proj.weight") as raised:
        check_checkpoint(parse_config(raw, "here"), HFReader(source))
    assert "unexpected model.layers.1.mlp.experts.0.down_proj.weight" in str(raised.value)


def test_folder_without_weights_is_named(tmp_path):
    from megatron_rl.model.convert import HFReader

    with pytest.raises(ValueError, match=f"model.path={tmp_path}: no \\*.safetensors file there"):
        HFReader(tmp_path)
