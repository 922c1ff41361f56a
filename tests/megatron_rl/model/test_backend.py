"""What model.backend takes on which machine, and which networks it refuses there."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megatron_rl.config.kernels import KernelConfig
from megatron_rl.config.schema import ModelConfig, ParallelConfig
from megatron_rl.model.architectures import parse_config
from megatron_rl.model.backend import check_backend, resolve
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.fresh import bailing_config
from megatron_rl.model.te_spec import layer_submodules
from tests.gpu.te_cases import network_of, networks_in

NETWORK = parse_config({**bailing_config(**FAMILIES["bailing_moe"].tiny), "hidden_size": 64, "head_dim": 16,
                        "moe_intermediate_size": 32}, "the test's network")


@pytest.mark.parametrize(("backend", "dtype", "gpu", "name", "at_once", "experts"), [
    ("auto", "bfloat16", True, "torch", True, "grouped_mm"),
    ("auto", "float32", True, "megatron", False, "megatron"),
    ("auto", "bfloat16", False, "megatron", False, "megatron"),
    ("torch", "bfloat16", True, "torch", True, "grouped_mm"),
    ("torch", "float32", False, "torch", False, "grouped_mm"),
    ("megatron", "bfloat16", True, "megatron", False, "megatron"),
    ("transformer_engine", "bfloat16", True, "transformer_engine", True, "transformer_engine"),
])
def test_auto_is_the_fast_parts_for_bfloat16_on_a_gpu(backend, dtype, gpu, name, at_once, experts):
    options = ModelConfig(backend=backend, dtype=dtype)
    check_backend(options, NETWORK, ParallelConfig(), gpu=gpu)
    found = resolve(options, gpu=gpu)
    assert (found.name, found.attention_at_once, found.kernels.experts) == (name, at_once, experts)
    assert found.kernels.router == "megatron"


@pytest.mark.parametrize(("options", "gpu", "logprob", "pointwise"), [
    ({"backend": "torch", "dtype": "bfloat16"}, True, "fused", "triton"),
    ({"backend": "torch", "dtype": "bfloat16", "fp32_lm_head": False}, True, "chunked", "triton"),
    ({"backend": "torch", "dtype": "bfloat16"}, False, "chunked", "torch"),
    ({"backend": "megatron", "dtype": "bfloat16"}, True, "chunked", "torch"),
    ({"backend": "transformer_engine", "dtype": "bfloat16"}, True, "chunked", "torch"),
])
def test_our_kernels_run_with_the_torch_backend_on_a_gpu_alone(options, gpu, logprob, pointwise):
    found = resolve(ModelConfig(**options), gpu=gpu).kernels
    assert (found.logprob, found.pointwise) == (logprob, pointwise)


def test_a_part_that_is_named_is_taken_under_every_backend():
    options = ModelConfig(backend="torch", dtype="bfloat16", kernels=KernelConfig(
        experts="triton", router="triton", logprob="liger", pointwise="torch"))
    assert resolve(options, gpu=True).kernels == options.kernels
    assert resolve(options, gpu=True).attention_at_once


BFLOAT16 = {"dtype": "bfloat16"}
GROUPED = {"kernels": KernelConfig(experts="grouped_mm")}


@pytest.mark.parametrize(("options", "sizes", "gpu", "message"), [
    ({"backend": "torch"}, {}, True, r"model\.backend=torch with model\.dtype=float32: .*model\.backend=megatron"),
    (BFLOAT16, {"head_dim": 20}, True, r"head_dim=20, .*model\.backend=auto .* 8 up to 256 .*model\.backend=megatron"),
    (BFLOAT16, {"head_dim": 264}, True, r"head_dim=264"),
    (BFLOAT16, {"moe_intermediate_size": 36}, True, r"model\.backend=auto: .* multiples of 8 in bfloat16, .*=36"),
    (BFLOAT16, {"hidden_size": 68}, True, r"model\.backend=auto: .*hidden_size=68"),
    ({"backend": "transformer_engine"}, {}, True, r"model\.backend=transformer_engine with model\.dtype=float32"),
    ({"backend": "transformer_engine", **BFLOAT16}, {}, False, r"model\.backend=transformer_engine: .* GPU only"),
    ({"backend": "transformer_engine", **BFLOAT16}, {"head_dim": 264}, True, r"head_dim=264, .*transformer_engine"),
    ({"kernels": KernelConfig(experts="transformer_engine"), **BFLOAT16}, {}, True,
     r"model\.kernels\.experts=transformer_engine needs model\.backend=transformer_engine"),
    ({"backend": "transformer_engine", "kernels": KernelConfig(pointwise="triton"), **BFLOAT16}, {}, True,
     r"model\.kernels\.pointwise=triton with model\.backend=transformer_engine, whose layers"),
    ({"backend": "torch"}, {"hidden_size": 66}, False, r"model\.backend=torch: .* multiples of 4 in float32"),
    (GROUPED, {"hidden_size": 66}, False, r"model\.kernels\.experts=grouped_mm: its product wants rows of 16 bytes"),
    (GROUPED, {}, True, r"model\.kernels\.experts=grouped_mm with model\.dtype=float32: on a GPU it takes bfloat16"),
])
def test_what_a_part_cannot_take_is_refused_by_its_key(options, sizes, gpu, message):
    network = dataclasses.replace(NETWORK, **sizes)
    with pytest.raises(ValueError, match=message):
        check_backend(ModelConfig(**options), network, ParallelConfig(), gpu=gpu)


def test_a_slice_of_an_expert_has_rows_of_its_own():
    wide = dataclasses.replace(NETWORK, moe_intermediate_size=24)
    check_backend(ModelConfig(**BFLOAT16), wide, ParallelConfig(), gpu=True)
    with pytest.raises(ValueError, match=r"moe_intermediate_size/parallel\.etp=12"):
        check_backend(ModelConfig(**BFLOAT16), wide, ParallelConfig(world_size=2, tp=2, etp=2), gpu=True)


def test_what_the_megatron_backend_takes_is_not_refused():
    odd = dataclasses.replace(NETWORK, head_dim=20, hidden_size=66, moe_intermediate_size=36)
    for dtype in ("float32", "bfloat16"):
        check_backend(ModelConfig(backend="megatron", dtype=dtype), odd, ParallelConfig(), gpu=True)


def test_transformer_engine_is_never_what_auto_takes(monkeypatch):
    """Whatever is installed: resolve asks neither the environment nor Megatron."""
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", True)
    for dtype, gpu in itertools.product(("float32", "bfloat16"), (True, False)):
        found = resolve(ModelConfig(dtype=dtype), gpu=gpu)
        assert "transformer_engine" not in (found.name, found.kernels.experts)


def test_transformer_engine_that_is_not_there_is_refused_by_its_key(monkeypatch):
    """By a rank too, which would otherwise build layers of a mock (megatron.core.extensions.transformer_engine)."""
    monkeypatch.setattr("megatron_rl.model.te_spec.HAVE_TE", False)
    with pytest.raises(ValueError, match=r"model\.backend=transformer_engine: .* not installed; .*TE=1.*=torch"):
        layer_submodules(num_experts=None, qk_norm=False)


@pytest.mark.parametrize(("changes", "options", "message"), [
    ({}, {"backend": "transformer_engine"}, "model.backend=transformer_engine: its layers have no latent attention"),
    ({}, {"recompute": "selective", "recompute_modules": ("moe", "core_attn")},
     "model.recompute_modules=moe,core_attn: latent attention"),
    ({"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"].tiny, "num_nextn_predict_layers": 1}, {"mtp": True},
     "model.mtp=true: the layer behind the last of a deepseek_v3 is carried through"),
    ({"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
     {"kernels": KernelConfig(router="triton")}, "model.kernels.router=triton: .* n_group=4; set"),
    ({"qk_nope_head_dim": 260}, {"backend": "torch"}, "model.path: head_dim=268, and the attention of"),
])
def test_what_a_backend_cannot_do_of_a_deepseek_is_refused_by_its_key(changes, options, message):
    network = parse_config({**FAMILIES["deepseek_v2"].tiny, "model_type": "deepseek_v2"} | changes, "here")
    with pytest.raises(ValueError, match=f"^{message}"):
        check_backend(ModelConfig(**{**BFLOAT16, **options}), network, ParallelConfig(), gpu=True)
    check_backend(ModelConfig(dtype="bfloat16", backend="megatron"), network, ParallelConfig(), gpu=True)


def test_the_networks_that_are_built_with_transformer_engine_are_those_that_it_takes():
    """`make test-te` runs seldom; this holds its list of networks (tests/gpu/te_cases.py) every day."""
    for name in FAMILIES:
        try:
            check_backend(ModelConfig(backend="transformer_engine", **BFLOAT16), network_of(name), ParallelConfig(),
                          gpu=True)
            taken = True
        except ValueError as refusal:
            assert "latent attention" in str(refusal)
            taken = False
        assert taken is (name in networks_in("one")), name
