"""Adapters in every layout: gradients, log-probabilities, W + BA and a step equal the float64 reference, and with the
adapters off the policy is the network that they stand beside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tests.distributed.cases as cases
from tests.distributed.lora_cases import LORA_CASES, LORA_LAYOUTS, WITH_VARIANTS, cases_in
from tests.distributed.reference_step import token_outputs
from tests.distributed.test_gradients import TOLERANCE, too_different

pytestmark = pytest.mark.slow
PAIRS = [(layout, name) for layout in LORA_LAYOUTS for name in cases_in(layout)]
in_layouts = pytest.mark.parametrize(("layout", "name"), PAIRS)


@pytest.mark.parametrize("name", LORA_CASES)
def test_every_matrix_of_the_reference_has_a_gradient(layouts, name):
    norms = {key: float(gradient.norm()) for key, gradient in layouts.lora_reference(name).gradients.items()}
    assert min(norms.values()) > 1e-4, min(norms, key=norms.get)


@in_layouts
def test_gradients_equal_the_reference_and_no_other_parameter_has_one(layouts, layout, name):
    """With Megatron's experts, and with grouped products for them."""
    result, reference = layouts.lora(layout)[name], layouts.lora_reference(name)
    for found in (result["gradients"], result["grouped"]):
        assert too_different(found, reference.gradients) == {}


@in_layouts
def test_a_step_clips_by_the_adapters_norm_and_moves_them_alone(layouts, layout, name):
    reference = layouts.lora_reference(name)
    update = {key: reference.updated[key] - reference.start[key] for key in reference.start}
    results = layouts.lora(layout)[name]["updated"]
    assert results.keys() == ({"plain", *cases.VARIANTS} if (layout, name) in WITH_VARIANTS else {"plain"})
    for variant, result in results.items():
        assert result["gauges"]["train/grad_norm"] == pytest.approx(reference.grad_norm, rel=TOLERANCE), variant
        assert too_different(result["adapters"], reference.updated, update) == {}, variant
        assert result["differing_replicas"] == [], variant


@in_layouts
def test_what_is_exported_is_w_plus_ba(layouts, layout, name):
    found, reference = layouts.lora(layout)[name]["merged"], layouts.lora_reference(name)
    assert found.keys() == reference.merged.keys()
    changed = 0
    for key, expected in reference.merged.items():
        if torch.equal(expected, reference.base[key]):
            assert torch.equal(found[key].double(), expected), key
        else:
            changed += 1
            torch.testing.assert_close(found[key].double(), expected, rtol=1e-5, atol=1e-6)
    assert changed > 0


@in_layouts
def test_logprobs_with_adapters_on_and_off_equal_the_reference(layouts, layout, name):
    result, reference = layouts.lora(layout)[name], layouts.lora_reference(name)
    for found, weights in ((result["logprobs"], reference.merged), (result["off"], reference.base)):
        for index, tokens in enumerate(reference.step.token_ids):
            with torch.no_grad():
                expected = token_outputs(weights, reference.config, tokens)[0]
            np.testing.assert_allclose(found[index].double(), expected, rtol=0, atol=2e-5)
