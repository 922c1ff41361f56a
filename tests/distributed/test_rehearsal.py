"""Rehearsed ranks against real ones: a recorder on four processes over gloo and on a world that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tests.distributed.rehearsal_worker as worker
from megatron_rl.rehearsal.ranks import distinct_ranks

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict[str, dict]:
    """`real`: case -> rank -> phases; `rehearsed`: the same of the distinct ranks."""
    folder = tmp_path_factory.mktemp("rehearsal")
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.distributed.rehearsal_worker", str(folder)],
                          cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict] = {"real": {}, "rehearsed": {}}
    for file in folder.glob("rank_*.json"):
        rank, each = int(file.stem.split("_")[1]), json.loads(file.read_text())
        for name, phases in each["real"].items():
            found["real"].setdefault(name, {})[rank] = phases
        for name, ranks in each["rehearsed"].items():
            found["rehearsed"].setdefault(name, {}).update({int(rank): phases for rank, phases in ranks.items()})
    return found


@pytest.mark.parametrize("name", worker.CASES)
def test_a_rehearsed_rank_is_a_real_one(recorded, name):
    """FLOPs, every collective with its group and bytes, and the peak of memory, phase by phase, exactly."""
    rehearsed = recorded["rehearsed"][name]
    assert sorted(rehearsed) == distinct_ranks(worker.case(name)[0].parallel)
    for rank, phases in rehearsed.items():
        assert phases["update"]["flops"] > 0 and phases["update"]["collectives"]
        assert phases == recorded["real"][name][rank], rank
