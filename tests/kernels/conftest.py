"""Kernels run on the GPU where there is one, else in Triton's interpreter (tests/conftest.py imports triton for it)."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Modules with kernels that are first imported inside a test are interpreted too."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def mutated(tmp_path, monkeypatch):
    """mutated(module, old, new): a copy of a kernel's module whose source has `old`, which occurs once, replaced."""
    def make(module, old: str, new: str):
        source = inspect.getsource(module)
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
        path = tmp_path / "mutated_triton_impl.py"
        path.write_text(source.replace(old, new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location("mutated_triton_impl", path)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    return make
