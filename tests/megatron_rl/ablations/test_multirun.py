"""What a multirun asks of Slurm; that its jobs run is tests/slurm's."""

import importlib.util

import pytest

from megatron_rl.ablations.multirun import minutes, resources
from megatron_rl.config.load import load


@pytest.mark.parametrize(("text", "expected"), [
    ("90", 90), ("1:30", 2), ("24:00:00", 1440), ("2-0", 2880), ("1-12:30", 2190), ("1-00:00:01", 1441)])
def test_time_limits_are_read_as_slurm_reads_them(text, expected):
    assert minutes(text) == expected


def test_a_time_limit_that_is_none_names_its_key():
    with pytest.raises(ValueError, match="slurm.time_limit=soon is not a time"):
        minutes("soon")


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit: pip install -e '.[slurm]'")
def test_a_job_asks_for_its_ranks_and_its_engine_on_one_node():
    config = load(["experiment=quickstart", "slurm.partition=low", "slurm.cpus_per_task=2", "slurm.time_limit=1:00:00"])
    asked = resources("submitit_slurm", config)
    assert {"hydra.launcher.cpus_per_task=6", "hydra.launcher.timeout_min=60",
            'hydra.launcher.partition="low"'} <= set(asked)
    with pytest.raises(ValueError, match="slurm.nodes=2.*--slurm"):
        resources("submitit_slurm", load(["experiment=quickstart", "slurm.nodes=2"]))
