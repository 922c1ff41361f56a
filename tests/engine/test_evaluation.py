"""`megatron-rl evaluate` on several benchmarks, through a real engine."""

import json

import pytest

from megatron_rl import cli
from megatron_rl.config.load import load
from megatron_rl.recipes import evaluate

pytestmark = pytest.mark.slow


def test_each_set_has_its_own_samples_and_every_response_is_kept(live_engine, tmp_path, capsys):
    (tmp_path / "aime.jsonl").write_text('{"problem": "1+1", "answer": "002"}\n{"problem": "2+2", "answer": 4}\n')
    (tmp_path / "own.jsonl").write_text('{"prompt": "3+4", "answer": "7"}\n' * 3)
    overrides = [
        f"model.path={live_engine.folder}", f"rollout.engine.urls=[{live_engine.process.base_url}]",
        f"run.dir={tmp_path / 'run'}", "reward.routes.math=tests.rewards.brevity", "rollout.max_response_tokens=8",
        "eval.problems=0", "eval.samples_per_problem=2", "eval.benchmarks.own.problems=2",
        f"eval.benchmarks.own.data.path={tmp_path / 'own.jsonl'}", "eval.benchmarks.aime24.samples=4",
        "eval.benchmarks.aime24.data.source=aime", f"eval.benchmarks.aime24.data.path={tmp_path / 'aime.jsonl'}"]
    assert cli.main(["evaluate", *overrides]) == 0
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]
    assert {name: (values["problems"], values["samples_per_problem"]) for name, values in results.items()} == {
        "own": (2, 2), "aime24": (2, 4)}
    assert all(values["accuracy"] == values["pass@2"] == 1.0 for values in results.values())  # all are brief
    samples = [json.loads(line) for line in (tmp_path / "run" / "evaluation_samples.jsonl").read_text().splitlines()]
    assert [sample["set"] for sample in samples] == ["own"] * 4 + ["aime24"] * 8
    assert {sample["answer"] for sample in samples} == {"7", "2", "4"}
    assert "aime24" in capsys.readouterr().out

    row = evaluate.run(load([*overrides, "eval.problems=3", "data.source=chains", "rollout.max_context_tokens=80"]))
    assert (row["problems"], row["own/problems"], row["aime24/problems"]) == (3, 2, 2)  # as training logs it
    assert row["accuracy"] == row["own/accuracy"] == row["aime24/pass@4"] == 1.0
