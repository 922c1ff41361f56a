"""What is printed when a run has ended."""

from __future__ import annotations

import json

import pytest

from megatron_rl.launch.local import RunFailed
from megatron_rl.observe.failures import TooManyFailures
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.rollout.engines import EngineError
from megatron_rl.rollout.fleet import FleetError
from megatron_rl.runs import engine_errors, print_evaluations


@pytest.mark.parametrize("kind", [TooManyFailures, FleetError, EngineError, EngineHTTPError])
def test_what_engines_and_judges_leave_undone_is_a_failed_run_and_no_traceback(kind):
    with pytest.raises(RunFailed, match="why"), engine_errors():
        raise kind("why")


def test_a_run_without_evaluations_prints_no_table(tmp_path, capsys):
    (tmp_path / "eval.jsonl").touch()
    print_evaluations(tmp_path)
    assert capsys.readouterr().out == ""
    row = {"step": 0, "label": "before", "accuracy": 0.25, "low": 0.2, "high": 0.3, "mean_response_tokens": 7.0}
    (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
    print_evaluations(tmp_path)
    assert "0.200 - 0.300" in capsys.readouterr().out
