"""Dumps of steps: whole or not there, and only so many."""

import pytest
import torch

from megatron_rl.observe import dump
from megatron_rl.observe.dump import StepInputs, StepRecord


def write(folder, step: int, keep: int):
    partial = dump.start(folder, step)
    inputs = StepInputs([], "objective", {1: torch.tensor([1.0, 2.0])}, 0.5, 0.25)
    dump.write_rank(partial, 1, inputs)
    record = StepRecord(step, True, 1e-3, 1.0, float("nan"), float("inf"), {"run": {"seed": 0}})
    return dump.finish(partial, record, keep=keep), record


def test_a_dump_reads_back_as_written(tmp_path):
    folder, record = write(tmp_path, 3, keep=1)
    read = dump.read_record(folder)
    assert (read.step, read.skipped, read.grad_norm, read.config) == (3, True, float("inf"), record.config)
    assert read.loss != read.loss  # NaN
    inputs = dump.read_rank(folder, 1, torch.device("cpu"))
    assert (inputs.objective, inputs.balance_coef, inputs.counts[1].tolist()) == ("objective", 0.5, [1.0, 2.0])


def test_only_the_newest_stay(tmp_path):
    for step in (1, 7, 12):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000007", "step_00000012"]


def test_an_unfinished_dump_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"is not the dump of a step: there is no step.json"):
        dump.read_record(dump.start(tmp_path, 4))
