"""Ling's shape, Ling 2.0's, Qwen's and GLM's, biases, norms of heads and tied embeddings, in every layout for them.

As for the network of cases.py: checkpoints return bit for bit, log-probabilities and gradients equal the float64
reference.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tests.distributed.cases as cases
from tests.distributed.networks import BIAS_RATE, NETWORKS, networks_in
from tests.distributed.reference_step import experts_of, token_outputs
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
    for index, (tokens, experts) in enumerate(zip(network.step.token_ids, experts_of(network.step), strict=True)):
        with torch.no_grad():
            expected = token_outputs(weights, network.config, tokens, experts)[0]
        np.testing.assert_allclose(found[index].double(), expected, rtol=0, atol=1e-5)


@of_networks_with_gradients
def test_gradients_equal_the_reference(layouts, layout, name):
    result, reference = layouts.networks(layout)[name], layouts.network(name).reference
    assert too_different(result["gradients"], reference.gradients) == {}
    assert result["updated"]["gauges"]["train/grad_norm"] == pytest.approx(reference.grad_norm, rel=TOLERANCE)


@pytest.mark.parametrize(("layout", "name"), [pair for pair in PAIRS if pair[1].startswith("bailing_v2")])
def test_expert_biases_move_towards_an_equal_load(layouts, layout, name):
    network, updated = layouts.network(name), layouts.networks(layout)[name]["updated"]["weights"]
    assert len(network.loads) == 3
    for layer, load_E in enumerate(network.loads, start=1):
        bias = f"model.layers.{layer}.mlp.gate.expert_bias"
        moved = BIAS_RATE * torch.sign(load_E.mean() - load_E)
        assert float(moved.abs().sum()) > 10 * BIAS_RATE
        torch.testing.assert_close(updated[bias].double(), network.weights[bias].double() + moved, rtol=0, atol=1e-7)


@in_layouts
def test_copies_of_a_parameter_stay_equal_after_a_step(layouts, layout, name):
    """A tied embedding has one on the first and one on the last pipeline stage."""
    assert layouts.networks(layout)[name]["updated"]["differing_replicas"] == []


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "ling"])
def test_every_parameter_of_the_reference_has_a_gradient(layouts, name):
    norms = {key: float(gradient.norm()) for key, gradient in layouts.network(name).reference.gradients.items()}
    assert min(norms.values()) > 1e-4, min(norms, key=norms.get)
