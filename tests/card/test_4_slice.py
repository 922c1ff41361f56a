"""Four layers of Ling-lite at their real width: passes, a step, a profile, and the memory that `plan` gives."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.card.place import NO_TE, TE_NEEDS_CARD, at

pytestmark = pytest.mark.slow

TOLERANCE = 0.1


def memory_fault(row: str) -> str | None:
    """Why the peak is not the plan's, from a row of the benchmark's table: claim, ours, the plan's, ratio."""
    ratio = float(row.split()[-1])
    return None if abs(ratio - 1) <= TOLERANCE else f"{ratio} of the plan's peak, not within {TOLERANCE:.0%}: {row}"


@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
@at("pretended")
def test_a_slice_of_ling_lite_trains_in_the_memory_of_the_plan(place, backend, tmp_path):
    """Tiny on the pretended GPU, which does not count memory."""
    if backend == "transformer_engine" and not (place.on_card and importlib.util.find_spec(backend)):
        pytest.skip(NO_TE if place.on_card else TE_NEEDS_CARD)
    module = "benchmarks.ling_lite_slice" + ("_te" if backend == "transformer_engine" else "")
    size = ["--sequences", "3", "--steps", "1", "--no-save"] if place.on_card else ["--quick"]
    printed = place.run(module, *size, "--trace", str(tmp_path))
    (row,) = [line for line in printed.splitlines() if "peak memory against `plan`" in line]
    assert json.loads((tmp_path / f"{backend}.json").read_text())["traceEvents"]
    if place.on_card:
        assert memory_fault(row) is None


def test_a_peak_that_the_plan_does_not_know_is_a_fault():
    assert memory_fault("torch: peak memory against `plan`  65 GB  60  1.083") is None
    assert "1.2 of the plan's peak" in memory_fault("torch: peak memory against `plan`  72 GB  60  1.2")
    assert "0.8 of the plan's peak" in memory_fault("torch: peak memory against `plan`  48 GB  60  0.8")
