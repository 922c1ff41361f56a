"""The machine: what a run on a GPU needs is there."""

from __future__ import annotations

import json

import pytest

from tests.card.place import Place, at

pytestmark = pytest.mark.slow

NEEDED = ("GPU", "GPU driver", "nvcc", "NCCL", "/dev/shm")
SIZES = ("memory", "free disk")
"""Checks of the doctor that a busy test machine may fail."""


def checks(place: Place) -> dict[str, list[str]]:
    """Name of the doctor's check -> status, what was found."""
    return json.loads(place.run("tests.card.doctor").splitlines()[-1])


@at("cpu", "pretended")
def test_the_doctor_misses_nothing(place):
    found = checks(place)
    assert [(name, what) for name, (status, what) in found.items() if status == "missing"
            and (place.on_card or name not in (*SIZES, "nvcc"))] == []
    if place.on_card:
        assert [(name, *found[name]) for name in NEEDED if found[name][0] != "ok"] == []
