"""`make test` on a GPU machine starts nothing on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOW = "import os; from tests import conftest; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"


@pytest.mark.parametrize(("mine", "seen"), [({}, ""), ({"MEGATRON_RL_TEST_GPU": "1"}, "0,1")])
def test_gpus_are_hidden_from_tests_unless_asked_for(mine, seen):
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_RL_TEST_GPU"}
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, cwd=ROOT, check=True,
                          env=environment | {"CUDA_VISIBLE_DEVICES": "0,1"} | mine)
    assert done.stdout.strip() == seen
