"""What is printed when a run has ended."""

from __future__ import annotations

import json

import pytest

from megatron_rl import runs
from megatron_rl.config.load import load
from megatron_rl.launch.local import RunFailed
from megatron_rl.loop import End, Ended
from megatron_rl.observe.failures import TooManyFailures
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.rollout.engines import EngineError
from megatron_rl.rollout.fleet import FleetError
from megatron_rl.runs import engine_errors, print_evaluations, train_rl


@pytest.mark.parametrize("kind", [TooManyFailures, FleetError, EngineError, EngineHTTPError])
def test_what_engines_and_judges_leave_undone_is_a_failed_run_and_no_traceback(kind):
    with pytest.raises(RunFailed, match="why"), engine_errors():
        raise kind("why")


def test_a_run_that_ended_early_says_so_whoever_started_it(tmp_path, monkeypatch, capsys):
    """A pipeline and an ablation go on with the next run."""
    monkeypatch.setattr(runs, "_train_rl", lambda config: Ended(End.UNFILLABLE, "step 3: only 2 of 8 responses"))
    train_rl(load([f"run.dir={tmp_path}", "run.name=math_rl"]))
    assert f"math_rl in {tmp_path} ended early: step 3: only 2 of 8 responses" in capsys.readouterr().err


def test_a_run_without_evaluations_prints_no_table(tmp_path, capsys):
    (tmp_path / "eval.jsonl").touch()
    print_evaluations(tmp_path)
    assert capsys.readouterr().out == ""
    row = {"step": 0, "label": "before", "accuracy": 0.25, "low": 0.2, "high": 0.3, "mean_response_tokens": 7.0}
    (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
    print_evaluations(tmp_path)
    assert "0.200 - 0.300" in capsys.readouterr().out
