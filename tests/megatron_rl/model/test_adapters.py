"""What model.lora is refused for, by its key; what starts an adapter; what its folder and its base's identity hold."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.cli import main
from megatron_rl.config.kernels import KernelConfig
from megatron_rl.config.load import load
from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.schema import ModelConfig
from megatron_rl.launch.local import engines_for
from megatron_rl.model import adapter_folder
from megatron_rl.model.adapters import check_lora, check_served, count_trained, initial, matrix_slots
from megatron_rl.model.architectures import parse_config, read_config
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.fresh import bailing_config
from megatron_rl.model.slots import count_parameters
from megatron_rl.preflight import check_folders, model_rows
from tests.tiny_models import write_tiny_bailing

NETWORK = parse_config(bailing_config(num_hidden_layers=2, first_k_dense_replace=1, num_shared_experts=0), "tiny")
OPTIONS = ModelConfig(lora=LoraConfig(rank=4))


@pytest.mark.parametrize(("overrides", "words"), [
    *((["rollout.publish=adapter", f"rollout.{key}"], f"rollout.publish=adapter with rollout.{key}: ") for key in (
        "engine.tp=2", "engine.colocate=true", "engine.router=local", "collector=partial", "collector=async")),
    (["model.lora.rank=-1"], r"model.lora.rank=-1 must not be negative"),
    (["model.lora.alpha=0"], r"model.lora.alpha=0.0 must be positive"),
    (["model.lora.targets=[linear_kqv]"], r"model.lora.targets: there is no 'linear_kqv' \(did you mean linear_qkv\?"),
    (["model.lora.targets=[router]"], r"model.lora.targets: there is no 'router'.*there are linear_qkv"),
    (["model.lora.targets=[]"], r"model.lora.targets=\[\] leaves nothing to train"),
    (["model.lora.targets=[linear_qkv,linear_qkv]"], "model.lora.targets names a projection twice"),
    (["model.lora.experts=share"], r"model.lora.experts=share must be one of own, shared_outer, none"),
    (["model.lora.path=somewhere"], "model.lora.path=somewhere needs model.lora.rank"),
    (["model.lora.alpha=16"], "model.lora.alpha says nothing with model.lora.rank=0, which trains all weights"),
    (["model.lora.targets=[linear_qkv]"], "model.lora.targets says nothing"),
    (["model.lora.experts=none"], "model.lora.experts says nothing"),
])
def test_a_key_that_cannot_be_is_refused_by_its_name(overrides, words):
    with pytest.raises(ValueError, match=words):
        load(overrides)


@pytest.mark.parametrize(("options", "gpu", "words"), [
    (replace(OPTIONS, backend="transformer_engine", dtype="bfloat16"), True, "model.backend=transformer_engine"),
    (replace(OPTIONS, expert_bias_rate=0.01), False, "model.expert_bias_rate=0.01: model.lora freezes"),
    (replace(OPTIONS, lora=LoraConfig(rank=4, targets=("linear_fc1",), experts="none")), False,
     "experts=none puts no adapter into layer 1 of this bailing_moe"),
    (replace(OPTIONS, lora=LoraConfig(rank=4, targets=("linear_qkv",), experts="shared_outer")), False,
     "experts=shared_outer with model.lora.targets=linear_qkv: no routed expert"),
    (replace(OPTIONS, kernels=KernelConfig(experts="triton")), True, "model.kernels.experts=triton has no adapters"),
    (replace(OPTIONS, dtype="bfloat16"), True, "model.lora.rank=4: the grouped product .* multiples of 8 in bfloat16"),
])
def test_adapters_that_the_network_or_another_option_cannot_take_are_refused_by_the_key(options, gpu, words):
    with pytest.raises(ValueError, match=words):
        check_lora(options, NETWORK, gpu=gpu)
    check_lora(replace(options, lora=LoraConfig()), NETWORK, gpu=gpu)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_adapters_on_all_projections_and_none_on_its_router(family):
    network = parse_config({"torch_dtype": "float32", **FAMILIES[family].tiny, "model_type": family}, family)
    lora = LoraConfig(rank=2)
    slots = matrix_slots(network, lora)
    assert not any("router" in name or "gate_weight" in name for name in slots)
    whole = count_parameters(network)[0]
    assert 0 < count_trained(network, lora) < whole
    assert count_trained(network, LoraConfig()) <= whole  # without buffers
    if network.num_experts:
        fewer = [count_trained(network, replace(lora, experts=experts)) for experts in ("own", "shared_outer", "none")]
        assert fewer == sorted(fewer, reverse=True) and len(set(fewer)) == 3


@pytest.mark.parametrize(("model_type", "lora", "words"), [
    ("qwen3", LoraConfig(), "rollout.publish=adapter sends adapters, and model.lora.rank=0 trains all weights"),
    ("bailing_moe", LoraConfig(rank=4), "SGLang 0.5.23 has no adapters for dense and query_key_value of bailing_moe"),
    ("qwen3_moe", LoraConfig(rank=4), "with linear_fc1 and linear_fc2 in model.lora.targets: .* attention alone"),
    ("qwen3_moe", LoraConfig(rank=4, targets=("linear_proj", "linear_fc2"), experts="none"), "with linear_fc2 in"),
    ("glm4_moe", LoraConfig(rank=4, targets=("linear_qkv",)), "of llama, qwen2, qwen3, qwen3_moe, and not of glm4_moe"),
    ("llama", LoraConfig(rank=4, targets=("linear_fc2",)), "with linear_fc2 in .* pads the intermediate_size=100"),
    ("qwen3", LoraConfig(rank=4), ""),
    ("qwen3_moe", LoraConfig(rank=4, targets=("linear_qkv", "linear_proj")), ""),
])
def test_adapters_that_engines_cannot_serve_are_refused_by_the_key(model_type, lora, words):
    config = bailing_config() if model_type == "bailing_moe" else {
        "model_type": model_type, **FAMILIES[model_type].tiny}
    if "=100" in words:
        config["intermediate_size"] = 100
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        check_served(lora, parse_config(config, "tiny"))


def test_a_projection_that_latent_attention_has_not_is_refused_by_its_name():
    options = ModelConfig(lora=LoraConfig(rank=4))
    network = parse_config({**FAMILIES["deepseek_v2"].tiny, "model_type": "deepseek_v2"}, "deepseek_v2")
    with pytest.raises(ValueError, match="model.lora.targets=linear_qkv,.*: this deepseek_v2 has no linear_qkv; leave "
                       "it out, it has linear_proj, .*linear_q_proj, linear_kv_down_proj, linear_kv_up_proj"):
        check_lora(options, network, gpu=False)
    check_lora(replace(options, lora=LoraConfig(rank=4, targets=("linear_q_proj", "linear_kv_down_proj"))), network,
               gpu=False)


def test_a_summary_says_for_which_families_peft_gives_other_logits():
    """Which these are, test_peft.py finds out."""
    config = load(["model.path=base", "model.lora.rank=8"])
    said = {family for family in FAMILIES if "adapter folder" in dict(model_rows(config, parse_config(
        {"torch_dtype": "float32", **FAMILIES[family].tiny, "model_type": family}, family)))}
    assert said == {"deepseek_v2", "deepseek_v3", "glm4_moe", "qwen2_moe"}


def test_a_fresh_adapter_depends_on_name_and_seed_and_adds_nothing():
    name = "model.layers.0.attention.dense.lora_A.weight"
    drawn = initial(name, (4, 64), 0)
    assert torch.equal(drawn, initial(name, (4, 64), 0))
    assert not torch.equal(drawn, initial(name, (4, 64), 1))
    assert not torch.equal(drawn, initial(name.replace("dense", "query_key_value"), (4, 64), 0))
    assert 0.11 < float(drawn.abs().max()) <= 0.125  # 1 / sqrt(64)
    assert not initial(name.replace("lora_A", "lora_B"), (64, 4), 0).any()


@pytest.fixture
def written(tmp_path):
    """(options, network, matrices) of an adapter folder at tmp_path/adapter."""
    base = write_tiny_bailing(tmp_path / "base", seed=3)
    network, options = read_config(base), ModelConfig(path=str(base), lora=LoraConfig(rank=2, experts="shared_outer"))
    matrices = {name: torch.randn(shape) for slot in matrix_slots(network, options.lora).values()
                for name, shape in slot.shapes.items()}
    adapter_folder.write_adapter_folder(tmp_path / "adapter", options, network, matrices.items())
    adapter_folder.write_adapter_folder(tmp_path / "adapter", options, network, matrices.items())  # its own is replaced
    return replace(options, lora=replace(options.lora, path=str(tmp_path / "adapter"))), network, matrices


def test_a_folder_comes_back_matrix_by_matrix(written):
    options, network, matrices = written
    found = adapter_folder.read_adapters(options, network)
    assert found.keys() == matrices.keys() and all(torch.equal(found[name], matrices[name]) for name in matrices)


def test_who_may_read_one_file_of_the_folder_may_read_all(written, tmp_path):
    assert len({file.stat().st_mode for file in (tmp_path / "adapter").iterdir()}) == 1


def test_an_adapter_folder_for_another_base_is_refused_whatever_the_base_is_called(written, tmp_path):
    options, network, _ = written
    moved = tmp_path / "moved"
    shutil.copytree(options.path, moved)
    adapter_folder.read_adapters(replace(options, path=str(moved)), network)  # the same weights elsewhere
    tensors = load_file(moved / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    adapter_folder.base_of.cache_clear()
    with pytest.raises(ValueError, match=r"adapter holds adapters of another base than model.path=.*moved: .*base, "):
        adapter_folder.read_adapters(replace(options, path=str(moved)), network)


@pytest.mark.parametrize(("change", "same"), [
    ({"max_position_embeddings": 4096}, True), ({"initializer_range": 0.5}, True), ({"rope_theta": 12345.0}, False)])
def test_a_base_is_the_same_while_its_config_changes_only_what_a_checkpoint_may_change(written, change, same):
    options, network, _ = written
    config = Path(options.path) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    adapter_folder.base_of.cache_clear()
    with contextlib.nullcontext() if same else pytest.raises(ValueError, match="adapters of another base"):
        adapter_folder.read_adapters(options, network)


@pytest.mark.parametrize(("change", "words"), [
    ({"rank": 4}, r"model.lora.rank=4, and .*adapter has 2: set it so"),
    ({"alpha": 1.0}, r"model.lora.alpha=1.0, and .*adapter has 32.0"),
    ({"experts": "own"}, r"model.lora.experts=own, and .*adapter has shared_outer"),
    ({"targets": ("linear_fc1",)}, r"model.lora.targets=\[linear_fc1\], and .*adapter has \[linear_fc1,linear_fc2,"),
])
def test_a_folder_of_other_adapters_is_refused_by_the_key(written, change, words):
    options, network, _ = written
    with pytest.raises(ValueError, match=words):
        adapter_folder.read_adapters(replace(options, lora=replace(options.lora, **change)), network)


def test_a_folder_that_is_no_adapter_folder_of_ours_is_refused(written, tmp_path):
    options, network, matrices = written
    (tmp_path / "adapter" / adapter_folder.ABOUT).unlink()
    with pytest.raises(ValueError, match="another program wrote it"):
        adapter_folder.read_adapters(options, network)
    with pytest.raises(ValueError, match="not replaced, because it is no adapter folder"):
        adapter_folder.write_adapter_folder(tmp_path / "adapter", options, network, matrices.items())
    with pytest.raises(ValueError, match="no adapter_model.safetensors there"):
        adapter_folder.read_adapters(replace(options, lora=replace(options.lora, path=str(tmp_path))), network)


@pytest.mark.parametrize(("name", "damage", "words"), [
    (adapter_folder.TENSORS, lambda content: content[:-8], "adapter_model.safetensors is damaged or cut short"),
    (adapter_folder.TENSORS, lambda content: b"", "adapter_model.safetensors is damaged or cut short"),
    (adapter_folder.ABOUT, lambda content: b"{}", "megatron_rl.json lacks rank, .* or base: the folder is damaged"),
    (adapter_folder.ABOUT, lambda content: b"[]", "megatron_rl.json lacks rank, .* or base: the folder is damaged"),
    (adapter_folder.ABOUT, lambda content: content[:-9], "megatron_rl.json is not JSON"),
])
def test_a_damaged_folder_is_refused_by_its_file(written, name, damage, words):
    options, network, _ = written
    file = Path(options.lora.path) / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=words):
        adapter_folder.read_adapters(options, network)


def test_pefts_configuration_names_the_modules_and_spares_experts_that_have_no_adapter(written, tmp_path):
    options, network, _ = written
    found = json.loads((tmp_path / "adapter" / adapter_folder.PEFT_CONFIG).read_text())
    assert found["target_modules"] == ["dense", "down_proj", "gate_proj", "query_key_value", "up_proj"]
    assert (found["r"], found["lora_alpha"], found["base_model_name_or_path"]) == (2, 32.0, options.path)
    spared = replace(options, lora=replace(options.lora, experts="none"))
    matrices = {name: torch.zeros(shape) for slot in matrix_slots(network, spared.lora).values()
                for name, shape in slot.shapes.items()}
    adapter_folder.write_adapter_folder(tmp_path / "spared", spared, network, matrices.items())
    found = json.loads((tmp_path / "spared" / adapter_folder.PEFT_CONFIG).read_text())
    assert found["target_modules"] == ["attention.dense", "attention.query_key_value", "shared_experts.down_proj",
                                       "shared_experts.gate_proj", "shared_experts.up_proj"]


@pytest.mark.parametrize("command", [["evaluate"], ["serve"], ["select-checkpoint"],
                                     ["data", "difficulty", "data.source=jsonl"]], ids=" ".join)
def test_engines_that_no_trainer_publishes_to_are_not_started_beside_an_adapter_folder(command, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1?", "answer": "2"}\n')
    more = [f"data.path={rows}", "--out", str(tmp_path / "out")] if command[0] == "data" else []
    assert main([*command, *more, "model.path=base", "model.lora.rank=8", "model.lora.path=adapter"]) == 2
    assert "model.lora.path=adapter: engines would serve model.path without it" in capsys.readouterr().err


def test_a_run_that_could_not_write_its_adapter_folder_at_the_end_is_refused_at_the_start(written, tmp_path):
    options, *_ = written
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "notes.txt").write_text("mine")
    config = load([f"model.path={options.path}", "model.lora.rank=2", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match="run/adapter: not replaced, because it is no adapter folder"):
        check_folders(config, exports=True)


@pytest.mark.parametrize(("words", "said"), [
    (["merge", "model.lora.rank=8"], "model.lora.path is not set: `convert merge` needs"),
    (["roundtrip", "model.lora.rank=8"], "model.lora.rank=8: `convert roundtrip` takes no adapters"),
    (["roundtrip", "model.lora.rank=8", "model.lora.path=adapter"], "model.lora.rank=8: `convert roundtrip`")])
def test_only_a_merge_takes_adapters(words, said, capsys):
    assert main(["convert", *words, "model.path=base"]) == 2
    assert said in capsys.readouterr().err


def test_a_run_whose_trainer_publishes_may_begin_with_an_adapter_folder(tmp_path):
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))  # nothing listens there, and this engine is left out until it answers
        config = load(["model.path=base", "model.lora.rank=8", "model.lora.path=adapter",
                       f"rollout.engine.urls=[http://127.0.0.1:{port.getsockname()[1]}]"])
        with engines_for(config, "base", tmp_path / "engine.log") as served:
            assert served.model.lora.path == "adapter"
