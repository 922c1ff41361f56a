"""Reading and writing a checkpoint takes memory for a tensor and a shard, not for the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SLACK = 16 * 2**20  # what the allocator keeps, imports on first use, the sampler's own


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.megatron_rl.model.memory_of_conversion",
         str(tmp_path_factory.mktemp("memory"))], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["write_random", "load", "export"])
def test_memory_is_bounded_by_the_largest_tensor_and_a_shard(peaks, stage):
    """At most three copies of one tensor (as read, cut or joined, cast) and the shard that is being filled."""
    bound = 3 * peaks["largest_tensor"] + peaks["shard"] + SLACK
    assert bound < 0.45 * peaks["model"]
    assert peaks[stage] < bound, peaks


@pytest.mark.slow
def test_the_measure_sees_a_whole_model(peaks):
    assert peaks["export_in_one_shard"] > 0.9 * peaks["model"]
