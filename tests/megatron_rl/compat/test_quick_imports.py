"""What the quick way of importing answers and leaves behind is what Python does."""

from __future__ import annotations

import gc
import importlib.metadata
from pathlib import Path

import setuptools

from megatron_rl.compat.quick_imports import packages_distributions, quick_imports


def test_every_package_belongs_to_the_distributions_that_python_finds(monkeypatch):
    monkeypatch.syspath_prepend(Path(setuptools.__path__[0]) / "_vendor")  # lists files that it lacks
    found, expected = packages_distributions(), importlib.metadata.packages_distributions()
    assert len(expected) > 50
    assert {name: sorted(owners) for name, owners in found.items()} == {
        name: sorted(owners) for name, owners in expected.items()}


def test_afterwards_python_is_as_it_was():
    original = importlib.metadata.packages_distributions
    with quick_imports():
        assert not gc.isenabled() and importlib.metadata.packages_distributions is not original
    assert gc.isenabled() and importlib.metadata.packages_distributions is original
