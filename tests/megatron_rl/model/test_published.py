"""config.json of published checkpoints, as they ship in hf_files/: sizes, and what tells one family from another."""

from __future__ import annotations

import json

import pytest

from megatron_rl.model.architectures import HF_FILES, parse_config
from megatron_rl.model.slots import count_parameters

SIZES = {  # name -> (all parameters, those that a token passes through), in 10^9, as published
    "ling_lite": (16.8, 2.75), "ling_mini_2": (16.26, 1.43), "ling_flash_2": (100, 6.1), "ling_1t": (1000, 50),
    "deepseek_v2_lite": (15.7, 2.4), "deepseek_v2": (236, 21), "deepseek_v3": (671, 37),
    "moonlight_16b_a3b": (15.96, 2.24),
    "glm_4_5_air": (106, 12), "qwen1_5_moe_a2_7b": (14.3, 2.7), "qwen3_30b_a3b": (30.5, 3.3)}
WITHOUT_TABLES = {"glm_4_5_air": 2, "moonlight_16b_a3b": 2, "deepseek_v2_lite": 1}
"""Their second number leaves so many of the embedding table and the head out."""


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def raw(name: str) -> dict:
    return json.loads((HF_FILES / f"{name}.json").read_text())


def test_every_shipped_configuration_is_counted():
    assert {file.stem for file in HF_FILES.glob("*.json")} == set(SIZES)


@pytest.mark.parametrize(("name", "published"), SIZES.items())
def test_a_published_configuration_counts_to_the_published_sizes(name, published):
    network = parse_config(raw(name), name)
    total, active = count_parameters(network)
    tables = WITHOUT_TABLES.get(name, 0) * network.vocab_size * network.hidden_size
    assert total / 1e9 == pytest.approx(published[0], rel=0.03)
    assert (active - tables) / 1e9 == pytest.approx(published[1], rel=0.03)


def test_ling_mini_2_counts_789_million_without_its_vocabulary():
    network = parse_config(raw("ling_mini_2"), "ling_mini_2")
    total, active = count_parameters(network)
    assert total == 16_255_643_392
    assert active - 2 * network.vocab_size * network.hidden_size == 789_147_392  # published: 789M non-embedding


def test_the_class_tells_ling_2_from_ling_under_one_model_type():
    old, new = (parse_config(raw(name), name) for name in ("ling_lite", "ling_mini_2"))
    assert (old.model_type, new.model_type) == ("bailing_moe", "bailing_moe_v2")
    assert parse_config({**raw("ling_mini_2"), "model_type": "bailing_moe_v2"}, "here") == new
    with pytest.raises(ValueError, match="partial_rotary_factor=0.5 is not supported; only 1.0 is"):
        parse_config({**raw("ling_mini_2"), "architectures": ["BailingMoeForCausalLM"]}, "here")


@pytest.mark.parametrize("name", ["ling_mini_2", "ling_1t"])
def test_half_a_head_rotates_whichever_key_says_so(name):
    config = {key: value for key, value in raw(name).items() if key not in ("partial_rotary_factor", "rotary_dim")}
    assert parse_config(raw(name), name).rotary_dim == 64
    for said in ({"rotary_dim": 64}, {"partial_rotary_factor": 0.5}, {"rotary_dim": 64, "partial_rotary_factor": 0.5}):
        assert parse_config({**config, **said}, "here").rotary_dim == 64
    assert parse_config(config, "here").rotary_dim == 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"rotary_dim": 32}, "rotary_dim=32 and partial_rotary_factor=0.5 of head_dim=128 say different things"),
    ({"rotary_dim": 256}, "rotary_dim=256 must be int in 1..head_dim=128"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 must be a number above 0, at most 1"),
    ({"partial_rotary_factor": 0.01}, "rotary_dim=1 must be even"),
    ({"score_function": "softmax"}, "score_function=softmax with moe_router_enable_expert_bias=true is not supported"),
    ({"score_function": "tanh"}, "score_function=tanh is not supported; only softmax, sigmoid are"),
    ({"moe_router_enable_expert_bias": False}, "score_function=sigmoid with moe_router_enable_expert_bias=false is"),
    ({"moe_router_enable_expert_bias": None}, "missing moe_router_enable_expert_bias"),
    ({"use_qk_norm": None}, "missing use_qk_norm"),
    ({"norm_topk_prob": False}, "norm_topk_prob=false with score_function=sigmoid is not supported"),
    ({"router_dtype": "bf16"}, "router_dtype=bf16 is not supported; only fp32 is"),
    ({"topk_group": 0}, "topk_group=0 must be in 1..n_group=8, or both be 0"),
    ({"topk_group": 9}, "topk_group=9 must be in 1..n_group=8, or both be 0"),
    ({"n_group": 6}, "n_group=6 does not divide num_experts=256"),
    ({"n_group": 256}, "n_group=256 leaves fewer than two of num_experts=256 to a group"),
    ({"n_group": 64, "topk_group": 1}, "num_experts_per_tok=8 are more experts than topk_group=1 of n_group=64 groups"),
    ({"routed_scaling_factor": 0.0}, "routed_scaling_factor=0.0 must be float above 0"),
    ({"norm_head": True}, "norm_head=true is not supported"),
    ({"multi_gate": True}, "multi_gate=true is not supported"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.original_max_position_embeddings=null must be"),
])
def test_what_ling_2_cannot_be_is_refused_by_its_key(changes, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        parse_config({**raw("ling_mini_2"), **changes}, "here")


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "moonlight_16b_a3b"])
@pytest.mark.parametrize(("changes", "message"), [
    ({"head_dim": 128}, "head_dim=128 is not supported; only qk_rope_head_dim=64 is"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8 is not supported: each of num_attention_heads=16 has a key"),
    ({"v_head_dim": 256}, r"v_head_dim=256 is not supported above qk_nope_head_dim\+qk_rope_head_dim=192"),
    ({"qk_rope_head_dim": 0}, "qk_rope_head_dim=0: latent attention has such dimensions"),
    ({"qk_rope_head_dim": 63}, "head_dim=191 must be even"),
    ({"kv_lora_rank": None}, "missing kv_lora_rank"),
    ({"topk_method": None}, "missing topk_method"),
    ({"topk_method": "sampled"}, "topk_method=sampled is not supported; only greedy, group_limited_greedy, "),
    ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; only 1 is"),
    ({"rope_interleave": False}, "rope_interleave=false is not supported"),
    ({"attention_bias": True}, "attention_bias=true is not supported"),
    ({"index_topk": 2048}, "index_topk=2048 is not supported: it makes another network"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling of type linear is not supported: the engine"),
    ({"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate=false is not supported: the engine"),
    ({"rope_scaling": {**YARN, "mscale": 0.7}}, "rope_scaling.mscale=0.7 with mscale_all_dim=None is not supported"),
    ({"rope_scaling": {**YARN, "mscale": 0}}, "rope_scaling.mscale=0.0 with mscale_all_dim=None is not supported"),
    ({"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, "rope_scaling.mscale=None with mscale_all_dim=1.0 is not"),
])
def test_what_latent_attention_cannot_be_is_refused_by_its_key(name, changes, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        parse_config({**raw(name), **changes}, "here")


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("deepseek_v2_lite", {"norm_topk_prob": True}, "norm_topk_prob=true is not supported; only false is"),
    ("deepseek_v2_lite", {"scoring_func": "sigmoid"}, 'scoring_func="sigmoid" is not supported; only "softmax" is'),
    ("deepseek_v2_lite", {"topk_method": "noaux_tc"}, "topk_method=noaux_tc with score_function=softmax is not"),
    ("deepseek_v2", {"topk_method": "greedy"}, "topk_method=greedy with topk_group=3 of n_group=8 is not supported"),
    ("deepseek_v2", {"n_group": 7}, "n_group=7 does not divide num_experts=160"),
    ("moonlight_16b_a3b", {"norm_topk_prob": False}, "norm_topk_prob=false with score_function=sigmoid is not"),
    ("moonlight_16b_a3b", {"topk_method": "greedy"}, "topk_method=greedy with score_function=sigmoid is not supported"),
])
def test_what_a_deepseek_router_cannot_be_is_refused_by_its_key(name, changes, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        parse_config({**raw(name), **changes}, "here")


@pytest.mark.parametrize("key", ["q_lora_rank", "moe_layer_freq"])
def test_a_key_whose_absence_the_engine_does_not_take_is_missing(key):
    with pytest.raises(ValueError, match=f"^here: missing {key}"):
        parse_config({name: value for name, value in raw("deepseek_v2_lite").items() if name != key}, "here")


def test_yarn_sharpens_the_softmax_of_latent_attention():
    """0.1 * 0.707 * ln 40 + 1 = 1.260804, squared 1.589627; both cosines' factors are equal, so their ratio is 1."""
    network = parse_config(raw("deepseek_v2_lite"), "here")
    assert network.softmax_scale * 192**0.5 == pytest.approx(1.589627, rel=1e-6)
    assert network.rope.attention_factor == 1.0
    assert parse_config(raw("moonlight_16b_a3b"), "here").softmax_scale == pytest.approx(192**-0.5)
