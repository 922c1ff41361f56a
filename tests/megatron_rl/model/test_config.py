"""config.json is read strictly, and a layout that does not fit it is refused by the name of its key."""

from __future__ import annotations

import json

import pytest

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.model.architectures import parse_config, read_config
from megatron_rl.model.network import check_layout
from tests.tiny_models import TINY_CONFIG


def parsed(**changes):
    return parse_config({**TINY_CONFIG, **changes}, "config.json")


def test_every_size_is_read_from_the_file(tmp_path):
    """Odd values throughout, so that a default or a derived size in their place would show."""
    odd = {"vocab_size": 101, "hidden_size": 44, "intermediate_size": 57, "num_hidden_layers": 5,
           "num_attention_heads": 6, "num_key_value_heads": 3, "num_experts": 7, "num_shared_experts": 3,
           "num_experts_per_tok": 4, "moe_intermediate_size": 19, "norm_topk_prob": False, "rms_norm_eps": 1e-4,
           "rope_theta": 123.0, "max_position_embeddings": 77, "head_dim": 10, "first_k_dense_replace": 2,
           "norm_head": True, "initializer_range": 0.03}
    (tmp_path / "config.json").write_text(json.dumps({**TINY_CONFIG, **odd}))
    config = read_config(tmp_path)
    assert {key: value for key, value in vars(config).items() if key in odd} == odd
    assert config.shared_intermediate_size == 57  # 3 * 19
    assert config.num_moe_layers == 3
    assert [config.is_dense_layer(layer) for layer in range(5)] == [True, True, False, False, False]


@pytest.mark.parametrize("head_dim", [None, "absent"])
def test_head_dim_is_hidden_over_heads_unless_set(head_dim):
    raw = {**TINY_CONFIG, "head_dim": None}
    if head_dim == "absent":
        del raw["head_dim"]
    assert parse_config(raw, "config.json").head_dim == 16  # 64 / 4
    assert parsed(head_dim=24).head_dim == 24


def test_missing_keys_are_named_together():
    raw = {key: value for key, value in TINY_CONFIG.items() if key not in ("hidden_size", "num_experts", "head_dim")}
    with pytest.raises(ValueError, match="config.json: missing hidden_size, num_experts"):
        parse_config(raw, "config.json")


@pytest.mark.parametrize(("key", "value", "message"), [
    ("model_type", "gpt2", "model_type='gpt2' is not supported; only bailing_moe, .*llama"),
    ("rope_scaling", {"type": "longrope"}, "rope_scaling=.*longrope.* is not supported; only null, linear,"),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_scaling=.*dynamic.* engine and trainer would disagree"),
    ("rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling.factor=2 must be a float"),
    ("rope_scaling", {"type": "linear"}, "rope_scaling.factor=None must be a float"),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not"),
    ("use_qk_norm", True, "use_qk_norm=true is not supported"),
    ("hidden_act", "gelu", 'hidden_act="gelu" is not supported; only "silu" is'),
    ("use_bias", True, "use_bias=true is not supported"),
])
def test_what_the_network_cannot_do_is_refused(key, value, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        parsed(**{key: value})


def test_tied_embeddings_exclude_a_norm_head():
    assert parsed(tie_word_embeddings=True).tie_word_embeddings
    with pytest.raises(ValueError, match="config.json: tie_word_embeddings=true with norm_head=true"):
        parsed(tie_word_embeddings=True, norm_head=True)


@pytest.mark.parametrize(("keys", "theta", "factor"), [
    ({}, 600000.0, 1.0),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 600000.0, 4.0),
    ({"rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}}, 5e3, 2.0),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}, 5e3, 1.0),
])
def test_rope_is_read_as_old_and_new_transformers_write_it(keys, theta, factor):
    network = parsed(**keys)
    assert (network.rope_theta, network.rope.factor) == (theta, factor)


def test_dense_networks_have_no_experts_to_spread():
    dense = parse_config({**TINY_CONFIG, "model_type": "qwen3"}, "config.json")
    assert (dense.num_experts, dense.num_moe_layers, dense.qk_norm, dense.qkv_bias) == (0, 0, True, False)
    check_layout(dense, ParallelConfig(world_size=2, tp=2))
    with pytest.raises(ValueError, match="parallel.ep=2 splits experts, but this qwen3 network has none"):
        check_layout(dense, ParallelConfig(world_size=2, ep=2))


def test_folder_without_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"model.path={tmp_path}: no config.json there"):
        read_config(tmp_path)


@pytest.mark.parametrize(("model", "parallel", "message"), [
    ({"num_attention_heads": 6, "num_key_value_heads": 6}, {"tp": 4}, "parallel.tp=4 .* num_attention_heads=6"),
    ({"num_key_value_heads": 1}, {"tp": 2}, "parallel.tp=2 .* num_key_value_heads=1"),
    ({"vocab_size": 97}, {"tp": 2}, "parallel.tp=2 .* vocab_size=97"),
    ({"intermediate_size": 33, "first_k_dense_replace": 1}, {"tp": 2}, "parallel.tp=2 .* intermediate_size=33"),
    ({"moe_intermediate_size": 9}, {"tp": 2}, "parallel.tp=2 .* the shared experts' width=9"),
    ({"moe_intermediate_size": 9, "num_shared_experts": 2}, {"etp": 2}, "parallel.etp=2 .* moe_intermediate_size=9"),
    ({"num_experts": 9}, {"ep": 2}, "parallel.ep=2 .* num_experts=9"),
    ({"num_hidden_layers": 3}, {"pp": 2}, "parallel.pp=2 .* num_hidden_layers=3"),
    ({"num_hidden_layers": 6}, {"pp": 2, "vpp": 2}, r"parallel.pp\*vpp=4 .* num_hidden_layers=6"),
])
def test_parallel_size_that_does_not_divide_is_named(model, parallel, message):
    sizes = {name: size for name, size in parallel.items() if name != "vpp"}
    world_size = max(sizes.values()) if len(sizes) == 1 else 4
    with pytest.raises(ValueError, match=message.replace(" .* ", " does not divide ")):
        check_layout(parsed(**model), ParallelConfig(world_size=world_size, **parallel))


@pytest.mark.parametrize(("model", "parallel", "change", "message"), [
    ({"intermediate_size": 33}, {"world_size": 2, "tp": 2}, {"first_k_dense_replace": 1}, "tp=2 does not divide inter"),
    ({"num_hidden_layers": 4}, {"world_size": 8, "tp": 2, "pp": 2, "vpp": 2, "ep": 2, "etp": 2},
     {"num_hidden_layers": 5}, r"pp\*vpp=4 does not divide num_hidden_layers=5; 1, 5 would"),
    ({"num_experts": 6}, {"world_size": 3, "ep": 3}, {"num_experts": 8}, "ep=3 does not divide num_experts=8; 1, 2, 4"),
])
def test_a_layout_that_divides_passes_and_the_next_size_does_not(model, parallel, change, message):
    layout = ParallelConfig(**parallel)
    check_layout(parsed(**model), layout)
    with pytest.raises(ValueError, match=message):
        check_layout(parsed(**{**model, **change}), layout)
