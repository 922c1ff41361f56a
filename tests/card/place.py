"""Where the bodies of these tests run, and why one may be skipped on a card."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.distributed.conftest import REPOSITORY

NO_CARD = "no CUDA device: `make test-gpu` runs this on a machine with one"
NO_ENGINE = "SGLang's packages for a GPU (sglang-kernel) are not installed: make setup VARIANT=gpu"
TE_NEEDS_CARD = "Transformer Engine's kernels run on a card alone"
NO_TE = "Transformer Engine is not installed: make setup VARIANT=gpu TE=1"


@dataclass(frozen=True)
class Place:
    """name: cpu, pretended (the CPU's memory passes for a GPU's, tests/gpu/pretended_main.py), or card."""

    name: str

    @property
    def on_card(self) -> bool:
        return self.name == "card"

    @property
    def device(self) -> str:
        return "cuda" if self.on_card else "cpu"

    def run(self, *command: str, timeout_s: float = 840.0, **variables: str) -> str:
        """What `python -m COMMAND` printed; its last words if it failed. variables: of the environment."""
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}", **variables}
        if not self.on_card:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        pretended = ["tests.gpu.pretended_main"] if self.name == "pretended" else []
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", *pretended, *command], cwd=REPOSITORY,
                              env=environment, capture_output=True, text=True, timeout=timeout_s)
        if done.returncode:
            pytest.fail(f"{' '.join(command)}:\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}", pytrace=False)
        return done.stdout


def at(*places: str):
    """Runs a test at each of these places, and on a card."""
    return pytest.mark.parametrize("place", [*places, pytest.param("card", marks=pytest.mark.gpu)], indirect=True,
                                   scope="module")


def check_engine_packages(place: Place) -> None:
    """Skips on a card whose environment has the CPU's engine."""
    if place.on_card and importlib.util.find_spec("sgl_kernel") is None:
        pytest.skip(NO_ENGINE)
