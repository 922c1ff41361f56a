"""A step of C3PO in bfloat16 with each backend of a GPU, against float64 of the same weights."""

from __future__ import annotations

import pytest
import torch

import tests.distributed.cases as cases
from tests.card.place import NO_TE, TE_NEEDS_CARD, at
from tests.distributed.table import worst
from tests.distributed.test_bfloat16 import GRADIENT_BUDGET, LOGPROB_MAX, LOGPROB_MEAN, logprob_errors, write_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def step(place, tmp_path_factory):
    """(float64's step, what each backend made of it)."""
    folder = tmp_path_factory.mktemp("backends")
    reference = write_step(folder, cases.write_models(folder)[True])
    place.run("tests.distributed.worker", "card" if place.on_card else "torch_on_card", str(folder), "1", "one")
    return reference, torch.load(folder / "one.card.pt")


@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
@at("pretended")
def test_a_backend_keeps_the_error_budget_of_bfloat16(place, step, backend):
    reference, results = step
    if backend not in results:
        pytest.skip(NO_TE if place.on_card else TE_NEEDS_CARD)
    mean, largest = logprob_errors(results[backend]["logprobs"], reference)
    assert mean <= LOGPROB_MEAN and largest <= LOGPROB_MAX
    gradients = results[backend]["gradients"]
    assert gradients.keys() == reference.gradients.keys()
    assert worst(gradients, reference.gradients, reference.gradients) <= GRADIENT_BUDGET
