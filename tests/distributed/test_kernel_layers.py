"""Experts and router of rl_kernels in Megatron's MoE layer give the step, report and replay that its own give.

Against the same float64 reference as test_gradients.py. That checkpoints do not know the choice is a pair of
test_checkpoint.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tests.distributed.cases as cases
from megatron_rl.config.kernels import KernelConfig
from megatron_rl.model.architectures import parse_config
from megatron_rl.model.build import _check_triton
from tests.distributed.conftest import run_worker
from tests.distributed.networks import random_experts
from tests.distributed.reference_step import Reference, fill_logprobs, reference_step
from tests.distributed.test_gradients import TOLERANCE, too_different
from tests.distributed.test_router_replay import to_float64

PAIRS = [(layout, kernels) for layout, names in cases.KERNELS_IN.items() for kernels in names]
of_torch = pytest.mark.parametrize(("layout", "kernels"), [pair for pair in PAIRS if pair[1] not in cases.INTERPRETED])


@pytest.fixture(scope="module")
def given(layouts) -> Reference:
    """The reference whose experts are drawn at random."""
    step = cases.draw_sequences()
    network = parse_config(layouts.configs[True], "config.json")
    step = dataclasses.replace(step, routed_experts=random_experts(step, network))
    fill_logprobs(step, to_float64(layouts.start), layouts.configs[True])
    torch.save(step, layouts.folder / "given.pt")
    return reference_step(step, layouts.start, layouts.configs[True])


@pytest.fixture(scope="module")
def results(layouts, given) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        run_worker(("tests.distributed.worker", "kernels"), layouts.folder, 2,
                   [layout for layout in cases.KERNELS_IN if layout != "one"])
        patch.setenv("TRITON_INTERPRET", "1")
        run_worker(("tests.distributed.worker", "kernels"), layouts.folder, 1, ["one"])
    return {layout: torch.load(layouts.folder / f"{layout}.kernels.pt") for layout in cases.KERNELS_IN}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kernels"), PAIRS)
def test_gradients_are_the_references(results, layouts, layout, kernels):
    assert too_different(results[layout][kernels]["gradients"], layouts.reference.gradients) == {}


@pytest.mark.slow
@of_torch
def test_without_a_counting_pass_the_load_is_that_of_all_ranks(results, layouts, layout, kernels):
    assert too_different(results[layout][kernels]["without_counting_pass"], layouts.reference.gradients) == {}


@pytest.mark.slow
@of_torch
def test_the_report_with_the_routers_losses_is_the_references(results, layouts, layout, kernels):
    updated = results[layout][kernels]["updated"]
    reported = {**{key: total / count for key, (total, count) in updated["sums"].items()}, **updated["gauges"]}
    for key, expected in layouts.reference.report.items():
        assert reported[key] == pytest.approx(expected, rel=TOLERANCE), key
    own = results["ep2"]["megatron"]["updated"]["gauges"]
    router = [key for key in own if key.startswith("router/")]
    assert len(router) == 5  # mean load and entropy, and the load of 3 layers
    for key in router:
        assert reported[key] == pytest.approx(own[key], rel=TOLERANCE), key


@pytest.mark.slow
@of_torch
def test_replayed_experts_take_the_place_of_the_choice(results, given, layout, kernels):
    result = results[layout][kernels]
    assert too_different(result["given"], given.gradients) == {}
    assert result["given_updated"]["sums"]["router/replay_differing"] == \
        results["ep2"]["megatron"]["given_updated"]["sums"]["router/replay_differing"]


@pytest.mark.parametrize("chosen", [{"experts": "triton"}, {"router": "triton"}, {"logprob": "triton"},
                                    {"logprob": "fused"}, {"pointwise": "triton"}], ids=str)
def test_triton_without_a_gpu_and_without_its_interpreter_names_the_key(chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("rl_kernels.triton_impl.INTERPRETED", False)
    (key, value), = chosen.items()
    with pytest.raises(ValueError, match=f"model.kernels.{key}={value} needs a GPU"):
        _check_triton(KernelConfig(**chosen))
