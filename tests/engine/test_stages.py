"""A run in two stages through the command line: one run, one resume."""

from __future__ import annotations

import json

import pytest

from tests.engine.test_runs import (  # noqa: F401 (fixtures)
    engine_url,
    kill_after,
    rows,
    run,
    timeless,
    weights_digest,
)

pytestmark = pytest.mark.slow

# The first stage may take 4 steps, and reaches its plateau after 2, since no reward rises by 100.
STAGES = ["parallel=single", "run.steps=7", "run.dump_steps=[1]",
          "stages=[{name:short,steps:4,plateau_steps:1,plateau_gain:100,set:{algo.phi:70,optimizer.lr:1e-4}},"
          "{name:long,steps:3,optimizer:reset,set:{rollout.max_response_tokens:20,data.seed:8}}]"]


@pytest.fixture(scope="module")
def whole(model, engine_url, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("stages") / "whole"
    done = run(*STAGES, f"model.path={model}", f"run.dir={folder}", f"rollout.engine.urls=[{engine_url}]")
    assert done.returncode == 0, done.stderr
    return folder


def test_each_stage_trains_as_it_says_and_the_first_ends_at_its_plateau(whole):
    steps = rows(whole)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert [row["stage/index"] for row in steps] == [0, 0, 1, 1, 1]
    assert [row["train/selected_tokens"] for row in steps] == [70, 70, 100, 100, 100]
    assert [row["train/lr"] > 2e-4 for row in steps] == [False, False, False, True, True]  # warm-up begins anew
    assert max(row["mismatch/max_abs"] for row in steps) < 1e-4
    longest = [row["rollout/response_tokens_mean"] for row in steps]
    assert max(longest[:2]) <= 16 and (whole / "hf" / "config.json").is_file()
    assert [row["label"] for row in rows(whole, "eval.jsonl")] == ["before_rl", "during", "during", "after_rl"]


def test_a_reset_optimiser_counts_from_the_stage(whole):
    folder = whole / "checkpoints" / "step_00000005"
    assert json.loads((folder / "manifest.json").read_text())["optimizer_steps"] == 3
    state = json.loads((folder / "loop.json").read_text())
    assert sorted(path.parent.name for path in (whole / "dumps").glob("*/step_00000001")) == ["stage_0", "stage_1"]
    assert state["stage"] == {"name": "long", "index": 1, "first_step": 2, "over": True} and state["updates_done"] == 3


def test_a_run_killed_in_its_second_stage_ends_the_same(whole, model, engine_url, tmp_path):  # noqa: F811
    folder = tmp_path / "killed"
    same = (*STAGES, f"model.path={model}", f"run.dir={folder}")
    kill_after(3, folder, engine_url, *same)
    resumed = run(*same, f"rollout.engine.urls=[{engine_url}]", "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert [timeless(row) for row in rows(folder)] == [timeless(row) for row in rows(whole)]
    assert weights_digest(folder) == weights_digest(whole)
