"""A shared expert that computes while rows travel gives the same step as one that computes before."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import tests.distributed.cases as cases
from tests.distributed.conftest import run_worker
from tests.distributed.test_gradients import too_different

LAYOUTS = ("ep2", "tp2_ep2")
ROUNDING = 1e-6
"""Only the order in which gradients of one hidden state are added differs."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(layouts) -> dict:
    run_worker(("tests.distributed.worker", "shared_experts"), layouts.folder, 2, list(LAYOUTS))
    return {layout: torch.load(layouts.folder / f"{layout}.shared_experts.pt") for layout in LAYOUTS}


@pytest.mark.parametrize(("layout", "kernels", "recompute"), list(
    product(LAYOUTS, ("megatron", "torch"), ("none", "full"))))
def test_a_shared_expert_during_the_exchange_gives_the_same_step(results, layouts, layout, kernels, recompute):
    before, during = (results[layout][kernels, recompute, overlapped] for overlapped in (False, True))
    for kind in ("gradients", "weights"):
        errors = {name: cases.relative_error(during[kind][name], before[kind][name], None) for name in before[kind]}
        assert max(errors.values()) < ROUNDING, (kind, max(errors, key=errors.get))
    assert too_different(during["gradients"], layouts.reference.gradients) == {}
