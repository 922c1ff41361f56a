"""What is printed when a run has ended."""

from __future__ import annotations

import json

from megatron_rl.runs import print_evaluations


def test_a_run_without_evaluations_prints_no_table(tmp_path, capsys):
    (tmp_path / "eval.jsonl").touch()
    print_evaluations(tmp_path)
    assert capsys.readouterr().out == ""
    row = {"step": 0, "label": "before", "accuracy": 0.25, "low": 0.2, "high": 0.3, "mean_response_tokens": 7.0}
    (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
    print_evaluations(tmp_path)
    assert "0.200 - 0.300" in capsys.readouterr().out
