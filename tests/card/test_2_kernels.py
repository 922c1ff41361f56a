"""Our kernels, compiled for the card, against float64: the tests of tests/kernels that run on the device."""

from __future__ import annotations

import pytest

from tests.card.place import at

pytestmark = pytest.mark.slow

FILES = ("pointwise", "router_topk", "grouped_experts", "linear_logprob_triton", "linear_logprob_budget")
"""The others are about a CPU, the interpreter or the compiler."""
INTERPRETED = FILES[:1]
"""On the pretended GPU Triton's interpreter computes, which takes minutes for the others; `make test` has them all on
the CPU."""


@at("pretended")
def test_the_kernels_are_those_of_float64(place):
    """Without planted faults, each of which compiles a kernel anew, and without processes over gloo."""
    variables = {} if place.on_card else {"TRITON_INTERPRET": "1"}
    place.run("pytest", "-q", "-p", "no:cacheprovider", "-k", "not fault and not gloo",
              *(f"tests/kernels/test_{name}.py" for name in (FILES if place.on_card else INTERPRETED)), **variables)
