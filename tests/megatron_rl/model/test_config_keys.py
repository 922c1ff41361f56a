"""Every key of config.json that SGLang or transformers reads has a meaning here, or is refused by its name."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest

from megatron_rl.model.architectures import parse_config
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.families.base import COMMON, OTHER_NETWORKS
from megatron_rl.model.network import Network
from tests.config_reads import keys_read

PYTHONS_OWN = {"__class__", "_attn_implementation", "get_text_config"}
ROTATION = {"rope_parameters", "rope_scaling", "rope_theta", "layer_types"}  # checked by what is inside
in_families = pytest.mark.parametrize("model_type", FAMILIES)


def tiny(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **FAMILIES[model_type].tiny, **changes}


def network_keys(model_type: str) -> dict[str, tuple[str, ...]]:
    """Field of Network -> the keys that hold it in a config.json of the family."""
    family = FAMILIES[model_type]
    keys = {field.name: family.keys_of(field.name, field.default is not MISSING) for field in fields(Network)
            if field.name not in family.fixed and field.name not in ("model_type", "rope")}
    return {name: those for name, those in keys.items() if those}


@in_families
def test_every_key_that_the_engine_or_transformers_reads_is_known(model_type):
    family, read = FAMILIES[model_type], keys_read(model_type)
    assert len(read) > 100
    meant = {key for keys in network_keys(model_type).values() for key in keys} | family.meant
    known = meant | family.only.keys() | family.same.keys() | family.ignored
    unknown = read.keys() - known - COMMON - OTHER_NETWORKS - ROTATION - PYTHONS_OWN
    assert not unknown, {key: read[key] for key in unknown}


@in_families
def test_every_key_that_the_trainer_reads_is_read_by_the_engine_too(model_type):
    read, fields = keys_read(model_type), network_keys(model_type)
    assert len(fields) > 10
    for field, keys in fields.items():
        # the base of the rotation reaches both as a part of rope_parameters
        assert field in ("initializer_range", "rope_theta") or read.keys() & {*keys}, field


def other_than(value: Any) -> Any:
    """A value that the table does not accept."""
    if value is None:
        return "something"
    if isinstance(value, bool):
        return not value
    return [1] if isinstance(value, list) else "gelu" if isinstance(value, str) else value + 0.5


ONLY = [(model_type, key) for model_type, family in FAMILIES.items() for key in family.only]
OTHERS = [(model_type, key) for model_type, family in FAMILIES.items()
          for key in sorted(OTHER_NETWORKS - family.only.keys() - family.ignored - family.meant)]


@pytest.mark.parametrize(("model_type", "key"), ONLY)
def test_a_key_with_one_supported_value_is_refused_with_another(model_type, key):
    accepted = FAMILIES[model_type].only[key]
    parse_config(tiny(model_type), "here")
    if accepted is not None:
        assert parse_config(tiny(model_type, **{key: accepted}), "here") == parse_config(tiny(model_type), "here")
    with pytest.raises(ValueError, match=rf"^here: {key}=.* is not supported"):
        parse_config(tiny(model_type, **{key: other_than(accepted)}), "here")


@pytest.mark.parametrize(("model_type", "key"), OTHERS)
def test_a_key_of_another_network_is_refused_unless_it_is_empty(model_type, key):
    for empty in (None, False, 0, [], {}):
        assert parse_config(tiny(model_type, **{key: empty}), "here") == parse_config(tiny(model_type), "here")
    for full in (4096, ["sliding_attention"], {"quant_method": "fp8"}, True):
        with pytest.raises(ValueError, match=f"^here: {key}=.* makes another network than {model_type}"):
            parse_config(tiny(model_type, **{key: full}), "here")


@pytest.mark.parametrize(("model_type", "key"), [
    (model_type, key) for model_type, family in FAMILIES.items() for key in sorted(family.not_null)])
def test_null_is_refused_where_it_would_break_the_engine(model_type, key):
    with pytest.raises(ValueError, match=f"^here: {key}=null breaks the engine"):
        parse_config(tiny(model_type, **{key: None}), "here")


@pytest.mark.parametrize(("model_type", "key", "other"), [
    (model_type, *item) for model_type, family in FAMILIES.items() for item in family.same.items()])
def test_a_size_that_the_engine_reads_under_another_name_must_be_the_same(model_type, key, other):
    size = getattr(parse_config(tiny(model_type), "here"), other)
    assert parse_config(tiny(model_type, **{key: size}), "here") == parse_config(tiny(model_type), "here")
    with pytest.raises(ValueError, match=f"^here: {key}={size + 2} is not supported; only {other}="):
        parse_config(tiny(model_type, **{key: size + 2}), "here")


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


@in_families
@pytest.mark.parametrize(("keys", "message"), [
    ({"rope_parameters": LINEAR, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "say different things"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}, "rope_scaling": LINEAR}, "say different things"),
    ({"rope_parameters": {"full_attention": LINEAR}}, r"full_attention=.* in the rotation's parameters"),
    ({"rope_parameters": {**LINEAR, "mrope_section": [4, 2, 2]}}, r"mrope_section=\[4, 2, 2\] in the rotation's"),
    ({"rope_parameters": {"rope_type": "default", "use_fope": True}}, "use_fope=true in the rotation's"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 8.0}}, "only null, linear, llama3 and yarn are"),
    ({"rope_scaling": "linear"}, 'rope_parameters="linear" must be a mapping'),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with sliding_attention is not supported"),
    ({"layer_types": ["linear_attention", "chunked"]}, "layer_types with chunked, linear_attention is not supported"),
])
def test_another_rotation_or_attention_is_refused(model_type, keys, message):
    with pytest.raises(ValueError, match=rf"^here: .*{message}"):
        parse_config(tiny(model_type, **keys), "here")


@in_families
def test_two_keys_that_say_the_same_rotation_are_one(model_type):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 500.0}
    one = parse_config(tiny(model_type, rope_parameters=yarn), "here")
    assert (one.rope.kind, one.rope.factor, one.rope_theta) == ("yarn", 2.0, 500.0)
    assert parse_config(tiny(model_type, rope_parameters=yarn, rope_scaling=dict(yarn)), "here") == one
    full = parse_config(tiny(model_type, layer_types=["full_attention", "full_attention"]), "here")
    assert full == parse_config(tiny(model_type), "here")


@pytest.mark.parametrize("where", [{"partial_rotary_factor": 0.5}, {"rope_scaling": {
    **LINEAR, "partial_rotary_factor": 0.5}}])
@in_families
def test_a_part_of_the_head_rotates_in_some_families_alone(model_type, where):
    raw = tiny(model_type, **where)
    if FAMILIES[model_type].partial_rotation:
        assert parse_config(raw, "here").rotary_dim == 8
    else:
        with pytest.raises(ValueError, match="^here: partial_rotary_factor=0.5 is not supported; only 1.0 is"):
            parse_config(raw, "here")


WITH_HEAD_DIM = tuple(name for name, family in FAMILIES.items() if not family.is_latent)
WITH_EXPERTS = tuple(name for name, family in FAMILIES.items() if "num_experts" in family.tiny)


@pytest.mark.parametrize(("families", "changes", "message"), [
    (WITH_HEAD_DIM, {"head_dim": 15}, "head_dim=15 must be even"),
    (FAMILIES, {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    (FAMILIES, {"num_key_value_heads": 8}, "num_key_value_heads=8 does not divide num_attention_heads=4"),
    (FAMILIES, {"num_attention_heads": 0}, "num_attention_heads=0 must be int above 0"),
    (FAMILIES, {"hidden_size": "64"}, 'hidden_size="64" must be int above 0'),
    (FAMILIES, {"hidden_size": 64.5}, "hidden_size=64.5 must be int above 0"),
    (FAMILIES, {"num_hidden_layers": -2}, "num_hidden_layers=-2 must be int above 0"),
    (FAMILIES, {"num_hidden_layers": True}, "num_hidden_layers=true must be int above 0"),
    (FAMILIES, {"rms_norm_eps": float("inf")}, "rms_norm_eps=Infinity must be float above 0"),
    (FAMILIES, {"rope_theta": float("nan")}, "rope_theta=NaN must be float above 0"),
    (WITH_EXPERTS, {"num_experts": 0}, "num_experts=0: a .*_moe.* has experts"),
    (WITH_EXPERTS, {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be in 1..num_experts=8"),
    (WITH_EXPERTS, {"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be in 1..num_experts=8"),
    (WITH_EXPERTS, {"num_experts_per_tok": 1, "norm_topk_prob": True},
     "num_experts_per_tok=1 with norm_topk_prob=true is not supported"),
    (WITH_EXPERTS, {"norm_topk_prob": "yes"}, 'norm_topk_prob="yes" must be bool'),
    (WITH_EXPERTS, {"moe_intermediate_size": 0}, "moe_intermediate_size=0: experts have a width"),
    (("bailing_moe",), {"first_k_dense_replace": 2}, "first_k_dense_replace=2 leaves no layer of num_hidden_layers=2"),
    (("bailing_moe",), {"head_dim": None, "hidden_size": 66}, "num_attention_heads=4 does not divide hidden_size=66"),
])
def test_sizes_that_a_rank_or_the_engine_would_refuse_are_named(families, changes, message):
    for model_type in families:
        with pytest.raises(ValueError, match=f"^here: {message}"):
            parse_config(tiny(model_type, **changes), "here")


def test_top_1_without_division_is_a_network():
    network = parse_config(tiny("bailing_moe", num_experts_per_tok=1, norm_topk_prob=False), "here")
    assert (network.num_experts_per_tok, network.norm_topk_prob) == (1, False)


@pytest.mark.parametrize("key", ["norm_head", "use_qkv_bias", "num_shared_experts", "qk_norm"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_a_key_that_only_another_family_knows_changes_nothing(model_type, key):
    assert parse_config(tiny(model_type, **{key: 1}), "here") == parse_config(tiny(model_type), "here")
