"""Ling's shape, Qwen3 and Qwen3-MoE, biases, query and key norms and tied embeddings, in every layout that holds them.

As for the network of cases.py: checkpoints return bit for bit, log-probabilities and gradients equal the float64
reference.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tests.distributed.cases as cases
from tests.distributed.networks import NETWORKS, networks_in
from tests.distributed.reference_step import token_outputs
from tests.distributed.test_gradients import TOLERANCE, too_different

pytestmark = pytest.mark.slow
PAIRS = [(layout, name) for layout in cases.UP_TO_FOUR_RANKS for name in networks_in(layout)]
in_layouts = pytest.mark.parametrize(("layout", "name"), PAIRS)
of_networks_with_gradients = pytest.mark.parametrize(
    ("layout", "name"), [pair for pair in PAIRS if pair[1] != "ling"])  # test_gradients.py has this kind


@in_layouts
def test_round_trip_returns_every_tensor_bit_for_bit(layouts, layout, name):
    expected = {key: cases.sha256(tensor) for key, tensor in layouts.network(name).weights.items()}
    assert layouts.networks(layout)[name]["loaded"] == expected


@in_layouts
def test_logprobs_equal_the_reference(layouts, layout, name):
    network = layouts.network(name)
    weights = {key: tensor.double() for key, tensor in network.weights.items()}
    found = layouts.networks(layout)[name]["logprobs"]
    assert len(found) == len(layouts.step.token_ids) == 9
    for index, tokens in enumerate(layouts.step.token_ids):
        with torch.no_grad():
            expected = token_outputs(weights, network.config, tokens)[0]
        np.testing.assert_allclose(found[index].double(), expected, rtol=0, atol=1e-5)


@of_networks_with_gradients
def test_gradients_equal_the_reference(layouts, layout, name):
    result, reference = layouts.networks(layout)[name], layouts.network(name).reference
    assert too_different(result["gradients"], reference.gradients) == {}
    assert result["updated"]["gauges"]["train/grad_norm"] == pytest.approx(reference.grad_norm, rel=TOLERANCE)


@in_layouts
def test_copies_of_a_parameter_stay_equal_after_a_step(layouts, layout, name):
    """A tied embedding has one on the first and one on the last pipeline stage."""
    assert layouts.networks(layout)[name]["updated"]["differing_replicas"] == []


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "ling"])
def test_every_parameter_of_the_reference_has_a_gradient(layouts, name):
    norms = {key: float(gradient.norm()) for key, gradient in layouts.network(name).reference.gradients.items()}
    assert min(norms.values()) > 1e-4, min(norms, key=norms.get)
