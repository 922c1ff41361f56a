"""One C3PO step gives the same gradients, weights and report however it is split over processes and micro-batches.

Checkpoints pass through every layout unchanged, and the network that they make is the reference's.

The reference is plain torch in float64 (reference_step.py); each layout runs Megatron's own classes in float32. The
loss carries the clipped surrogate, KL, exact entropy, balance and z-losses, on ragged packed sequences with padding,
a dense first layer and a NormHead. The mutation tests show that the comparison sees a lost factor. A table of the
largest errors follows the tests' results (table.py; `make test-layouts`).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tests.distributed.cases as cases
from tests.distributed.cases import TOLERANCE
from tests.distributed.reference_step import distilled_gradients, token_outputs


def in_layouts(name: str = "layout", names=tuple(cases.LAYOUTS)):
    """One test per layout; those of several processes are not in the fast tier."""
    return pytest.mark.parametrize(name, [
        pytest.param(n, marks=() if cases.LAYOUTS[n]["world_size"] == 1 else pytest.mark.slow) for n in names])


def too_different(actual, expected, scale=None) -> dict[str, float]:
    """Names of expected whose relative error is above TOLERANCE, with it."""
    assert actual.keys() == expected.keys()
    errors = {name: cases.relative_error(actual[name], expected[name], None if scale is None else scale[name])
              for name in expected}
    return {name: error for name, error in errors.items() if not error <= TOLERANCE}


def test_every_parameter_of_the_reference_has_a_gradient(layouts):
    norms = {name: float(gradient.norm()) for name, gradient in layouts.reference.gradients.items()}
    assert min(norms.values()) > 1e-3, min(norms, key=norms.get)


@in_layouts()
def test_gradient_does_not_depend_on_layout(layouts, layout):
    assert len(layouts[layout]["gradients"]) == len(cases.MICROBATCHES)
    for count, gradients in layouts[layout]["gradients"].items():
        assert too_different(gradients, layouts.reference.gradients) == {}, f"{count} micro-batches per rank"


@in_layouts()
def test_gradient_does_not_depend_on_the_number_of_microbatches(layouts, layout):
    """Tighter than against the reference: both sides are float32 sums of the same terms."""
    first, *others = layouts[layout]["gradients"].values()
    assert len(others) == len(cases.MICROBATCHES) - 1 >= 2
    for gradients in others:
        errors = {name: cases.relative_error(gradients[name], first[name]) for name in first}
        assert max(errors.values()) < 3e-6, max(errors, key=errors.get)


@pytest.mark.parametrize("surrogate", cases.SURROGATES)
@in_layouts(names=[name for name in cases.LAYOUTS if cases.holds_whole_sequences(name)])
def test_a_ratio_of_many_tokens_does_not_depend_on_layout(layouts, layout, surrogate):
    expected = layouts.reference.surrogates[surrogate]
    assert too_different(layouts[layout]["surrogates"][surrogate], expected) == {}
    assert len(too_different(layouts.reference.gradients, expected)) == len(expected), "it must differ from ppo's"


@pytest.fixture(scope="module")
def distilled(layouts):
    return {name: distilled_gradients(layouts.step, layouts.start, layouts.configs, **options)
            for name, options in cases.DISTILLED.items()}


@pytest.mark.parametrize("case", cases.DISTILLED)
@in_layouts()
def test_the_dense_term_of_distillation_does_not_depend_on_layout(layouts, distilled, layout, case):
    """Teacher and student pick and score k tokens over the ranks of the vocabulary, of the sequence and of the stages.
    """
    assert too_different(layouts[layout]["distilled"][case], distilled[case]) == {}


@in_layouts()
def test_backend_torch_gives_these_gradients_and_calls_its_attention_once_a_layer(layouts, layout):
    """Its attention is asked only what its documentation lets one ask (varlen.py), in the counting pass and the update.
    """
    found = layouts[layout]["torch"]
    assert too_different(found["gradients"], layouts.reference.gradients) == {}
    assert found["calls"] == 2 * cases.UPDATE_MICROBATCHES * found["layers"] > 0


@in_layouts(names=[name for name in cases.LAYOUTS if cases.microbatch_multiple(name) == 1])
def test_without_a_counting_pass_one_microbatch_per_rank_still_sees_the_load_of_all_ranks(layouts, layout):
    assert too_different(layouts[layout]["without_counting_pass"], layouts.reference.gradients) == {}


@pytest.mark.parametrize("variant", ["plain", *cases.VARIANTS])
@in_layouts()
def test_weights_after_a_step_do_not_depend_on_layout(layouts, layout, variant):
    """Clipping by the global norm and AdamW with decay of matrices only; the error is measured against the update."""
    reference = layouts.reference
    update = {name: reference.updated[name] - reference.start[name] for name in reference.start}
    result = layouts[layout]["updated"][variant]
    assert result["gauges"]["train/grad_norm"] == pytest.approx(reference.grad_norm, rel=TOLERANCE)
    assert too_different(result["weights"], reference.updated, update) == {}


@pytest.mark.parametrize("variant", ["plain", *cases.VARIANTS])
@in_layouts()
def test_copies_of_a_parameter_stay_equal_bit_for_bit(layouts, layout, variant):
    assert layouts[layout]["updated"][variant]["differing_replicas"] == []


@in_layouts()
def test_step_report_does_not_depend_on_layout(layouts, layout):
    assert layouts[layout]["updated"].keys() == {"plain", *cases.VARIANTS} and len(layouts.reference.report) >= 6
    for result in layouts[layout]["updated"].values():
        reported = {**{key: total / count for key, (total, count) in result["sums"].items()}, **result["gauges"]}
        for key, expected in layouts.reference.report.items():
            assert reported[key] == pytest.approx(expected, rel=TOLERANCE), key


@pytest.mark.parametrize(("layout", "mutation"), [
    pytest.param(layout, mutation, marks=() if cases.LAYOUTS[layout]["world_size"] == 1 else pytest.mark.slow)
    for layout in cases.MUTATIONS for mutation in cases.MUTATIONS[layout]])
def test_a_broken_factor_shows(layouts, layout, mutation):
    errors = too_different(layouts[layout]["mutated"][mutation], layouts.reference.gradients)
    assert max(errors.values(), default=0.0) > 100 * TOLERANCE


@in_layouts()
def test_round_trip_returns_every_tensor_bit_for_bit(layouts, layout):
    assert layouts[layout]["loaded"] == {name: cases.sha256(tensor) for name, tensor in layouts.start.items()}


@in_layouts()
def test_passes_without_an_optimiser_step_leave_weights_alone(layouts, layout):
    assert layouts[layout]["after_gradients"] == layouts[layout]["loaded"]


@pytest.mark.parametrize("norm_head", [True, False], ids=["norm_head", "plain_head"])
@in_layouts()
def test_logprobs_equal_the_reference(layouts, layout, norm_head):
    weights = {name: tensor.double() for name, tensor in layouts.start.items()}
    found = layouts[layout]["logprobs"][norm_head]
    assert sorted(found) == list(range(len(layouts.step.token_ids)))
    for index, tokens in enumerate(layouts.step.token_ids):
        with torch.no_grad():
            expected = token_outputs(weights, layouts.configs[norm_head], tokens)[0]
        np.testing.assert_allclose(found[index].double(), expected, rtol=0, atol=1e-5)


def test_norm_head_changes_the_logprobs(layouts):
    found = layouts["one"]["logprobs"]
    assert (found[True][0] - found[False][0]).abs().max() > 0.1
