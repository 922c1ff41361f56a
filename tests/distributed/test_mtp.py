"""The layer behind the last trains in every layout as in float64, and the trunk does not notice by a bit."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import tests.distributed.cases as cases
from tests.distributed.networks import MTP_LAYOUTS, MTP_NETWORKS, MTP_WITH_VARIANTS, WrittenNetwork
from tests.distributed.test_gradients import TOLERANCE, too_different
from tests.reference_bailing import bailing_forward, is_frozen

pytestmark = pytest.mark.slow
in_layouts = pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in MTP_LAYOUTS
                                                          for name in MTP_NETWORKS])


@cache
def reference(network: WrittenNetwork) -> tuple[dict, dict, float, float]:
    """Gradients of the layer, its weights after clipping by their norm and AdamW, the norm and the loss, in float64."""
    trunk = {name: tensor.double() for name, tensor in network.weights.items()}
    layer = {name: tensor.double() for name, tensor in network.behind.items()}
    trained = {name: tensor.requires_grad_() for name, tensor in layer.items() if not is_frozen(name)}
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, mask in zip(network.step.token_ids, network.step.loss_mask, strict=True):
        logits, _ = bailing_forward(trunk | layer, network.config, tokens[:-1].tolist(), dtype=torch.float64, mtp=True)
        logprobs_LV = torch.log_softmax(logits / cases.TEMPERATURE, -1)
        chosen_L = logprobs_LV.gather(1, torch.from_numpy(tokens[2:, None]))[:, 0]
        total, count = total - chosen_L[torch.from_numpy(mask[2:])].sum(), count + int(mask[2:].sum())
    loss = total / count
    loss.backward()
    gradients = {name: tensor.grad.clone() for name, tensor in trained.items()}
    options = cases.OPTIMIZER
    norm = float(torch.nn.utils.clip_grad_norm_(trained.values(), options["clip_grad"]))
    decayed = {dim: [weight for weight in trained.values() if weight.dim() == dim] for dim in (1, 2)}
    torch.optim.AdamW([{"params": decayed[2], "weight_decay": options["weight_decay"]},
                       {"params": decayed[1], "weight_decay": 0.0}],
                      lr=cases.LEARNING_RATE, betas=(options["beta1"], options["beta2"]), eps=options["eps"]).step()
    return gradients, {name: tensor.detach() for name, tensor in layer.items()}, norm, loss.item()


@in_layouts
def test_the_trunk_is_the_same_bit_for_bit_with_it_and_without(layouts, layout, name):
    without, with_it = (layouts.mtp(layout)[name][mtp] for mtp in (False, True))
    trunk = layouts.network(name).weights.keys()
    assert without["gradients"].keys() == {key for key in trunk if not is_frozen(key)}
    for key, gradient in without["gradients"].items():
        assert torch.equal(gradient, with_it["gradients"][key]), key
    assert without["updated"].keys() == {"plain", *(cases.VARIANTS if layout in MTP_WITH_VARIANTS else ())}
    for variant, result in without["updated"].items():
        found = with_it["updated"][variant]
        for key in trunk:
            assert torch.equal(result["weights"][key], found["weights"][key]), (variant, key)
        assert result["gauges"] == {key: found["gauges"][key] for key in result["gauges"]}, variant


@pytest.mark.parametrize("distilled", cases.DISTILLED)
@pytest.mark.parametrize("name", MTP_NETWORKS)
@pytest.mark.parametrize("layout", MTP_WITH_VARIANTS)
def test_beside_the_probabilities_of_further_tokens_both_stay_as_they_are(layouts, layout, name, distilled):
    """algo.distillation.top_k: the head gives rows for k tokens and one for the layer."""
    found = layouts.mtp(layout)[name]
    without, with_it = (found[mtp]["distilled"][distilled] for mtp in (False, True))
    assert max(float(gradient.norm()) for gradient in without.values()) > 1e-3
    for key, gradient in without.items():
        assert torch.equal(gradient, with_it[key]), key
    behind = with_it.keys() - without.keys()
    alone = {key: found[True]["gradients"][key] for key in behind}
    assert behind and too_different({key: with_it[key] for key in behind}, alone) == {}


@in_layouts
def test_its_gradients_equal_the_reference(layouts, layout, name):
    network = layouts.network(name)
    found, expected = layouts.mtp(layout)[name][True]["gradients"], reference(network)[0]
    assert min(float(each.norm()) for each in expected.values()) > 1e-5
    assert too_different({key: found[key] for key in expected}, expected) == {}


@in_layouts
def test_a_step_clips_by_its_own_norm(layouts, layout, name):
    network = layouts.network(name)
    _, updated, norm, loss = reference(network)
    update = {key: updated[key] - network.behind[key].double() for key in updated}
    for variant, result in layouts.mtp(layout)[name][True]["updated"].items():
        assert result["gauges"]["train/mtp_grad_norm"] == pytest.approx(norm, rel=TOLERANCE), variant
        total, count = result["sums"]["train/mtp_loss"]
        assert total / count == pytest.approx(loss, rel=TOLERANCE) and count == sum(
            int(np.sum(mask[2:])) for mask in network.step.loss_mask)
        moved = {key: result["weights"][key] for key in updated}
        assert too_different(moved, updated, update) == {}, variant
        assert result["differing_replicas"] == [], variant


@in_layouts
def test_it_returns_from_the_layout_bit_for_bit(layouts, layout, name):
    network = layouts.network(name)
    expected = {key: cases.sha256(tensor) for key, tensor in (network.weights | network.behind).items()}
    assert {key: cases.sha256(each) for key, each in layouts.mtp(layout)[name][True]["loaded"].items()} == expected
