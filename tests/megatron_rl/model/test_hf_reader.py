"""A folder is read as the engine reads it: what the index names, every tensor once, nothing that cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.model.architectures import read_config
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.fresh import bailing_config, random_weights
from megatron_rl.model.hf_folder import INDEX, HFReader, check_checkpoint, write_hf_folder
from tests.tiny_models import write_tiny_bailing, write_tiny_known

TINY = bailing_config(hidden_size=32, num_hidden_layers=2, num_experts=4, moe_intermediate_size=16)
NAME = "model.layers.1.mlp.gate.weight"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Several shards and their index."""
    return write_hf_folder(tmp_path / "moe", TINY, random_weights(TINY, seed=1), max_shard_bytes=20_000)


def everything(folder: Path) -> dict[str, torch.Tensor]:
    reader = HFReader(folder)
    return {name: reader.get(name) for name in reader.names}


@pytest.mark.parametrize("left_over", ["model-00009-of-00009.safetensors", "zzz.safetensors", "model.safetensors",
                                       "aaa.safetensors"])
def test_left_over_files_beside_an_index_are_not_read(sharded, left_over):
    before = everything(sharded)
    save_file({name: tensor + 1 for name, tensor in before.items()}, sharded / left_over)
    after = everything(sharded)
    assert len(before) > 20 and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_left_over_file_with_other_tensors_is_not_read_either(sharded):
    save_file({"model.extra": torch.zeros(2)}, sharded / "extra.safetensors")
    check_checkpoint(read_config(sharded), HFReader(sharded))
    assert "model.extra" not in HFReader(sharded).names


def twice_in_the_index(folder: Path) -> None:
    """Two of the indexed shards hold the tensor."""
    files = sorted(folder.glob("*.safetensors"))
    last = load_file(files[-1])
    save_file({**last, NAME: torch.zeros(4, 32)}, files[-1])


def twice_without_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file({NAME: torch.zeros(4, 32)}, folder / "zzz.safetensors")


def no_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def no_weight_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"metadata": {}}')


def no_json(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def lacks_a_tensor(folder: Path) -> None:
    """The index names the file, which does not hold all that it should."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][NAME]
    save_file({name: tensor for name, tensor in load_file(file).items() if name != NAME}, file)


def eight_bits(folder: Path) -> None:
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][NAME]
    save_file({**load_file(file), NAME: torch.zeros(4, 32).to(torch.float8_e4m3fn)}, file)


@pytest.mark.parametrize(("damage", "message"), [
    (twice_in_the_index, rf"{NAME} is stored twice, in model-\d+-of-\d+.safetensors and in model-"),
    (twice_without_an_index, rf"{NAME} is stored twice, in model-\d+-of-\d+.safetensors and in zzz.safetensors"),
    (no_shard, rf"{INDEX} names model-00002-of-\d+.safetensors, which is not there"),
    (no_weight_map, rf"{INDEX}: it has no weight_map"),
    (no_json, rf"{INDEX} is not JSON"),
    (lacks_a_tensor, f"missing {NAME}"),
    (eight_bits, f"{NAME} is stored as F8_E4M3; only F32, BF16, F16, F64 are supported"),
])
def test_a_folder_that_cannot_be_meant_is_named(sharded, damage, message):
    check_checkpoint(read_config(sharded), HFReader(sharded))
    damage(sharded)
    with pytest.raises(ValueError, match=message) as refused:
        check_checkpoint(read_config(sharded), HFReader(sharded))
    assert str(sharded) in str(refused.value)


def tied(folder: Path, model_type: str) -> Path:
    if model_type.startswith("bailing_moe"):
        return write_tiny_bailing(folder, model_type, tie_word_embeddings=True)
    return write_tiny_known(folder, model_type, tie_word_embeddings=True)


def add(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file)


@pytest.mark.parametrize("model_type", [
    name for name, family in FAMILIES.items() if "tie_word_embeddings" not in family.only])
def test_frequencies_and_an_equal_tied_head_are_read_over(tmp_path, model_type):
    folder = tied(tmp_path / "model", model_type)
    weights = load_file(folder / "model.safetensors")
    embedding = weights[FAMILIES[model_type].names["embedding.word_embeddings.weight"][0]]
    add(folder, **{"lm_head.weight": embedding.clone(),
                   "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert not weights.keys() & {"lm_head.weight"}
    check_checkpoint(read_config(folder), HFReader(folder))
    add(folder, **{"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model\.\w+.weight, and .*tie_word_embeddings"):
        check_checkpoint(read_config(folder), HFReader(folder))
