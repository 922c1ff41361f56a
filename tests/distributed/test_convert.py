"""A Hugging Face folder that does not hold what its config.json says is refused, and each tensor is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file


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
