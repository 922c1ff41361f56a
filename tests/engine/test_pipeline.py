"""A whole pipeline through the command line: real ranks, a real engine, killed twice and gone on with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.launch.local import rank_environment
from megatron_rl.rollout.engines import EngineProcess
from tests.engine.faulty_proxy import FaultyProxy
from tests.engine.test_runs import ROOT, kill_launcher, rows, timeless, wait_for_rows, weights_digest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STAGES = ["base", "long_cot_sft", "choice", "math_rl", "code_science_rl", "general_sft"]
TRAINED = {"long_cot_sft": 8, "math_rl": 3, "code_science_rl": 2, "general_sft": 2}  # steps
SMALL_SFT = ["parallel=single", "sft.examples=64", "sft.schedule_epochs=null"]
SMALL_RL = ["parallel=single", "run.save_every_steps=1", "eval.every_steps=0", "rollout.prompts_per_step=4",
            "rollout.responses_per_prompt=2", "rollout.max_response_tokens=12", "algo.phi=32",
            "algo.underfull=train_short", "reward.routes.math=tests.rewards.brevity"]
SMALL = [
    "experiment=ring_lite_tiny", "rollout.engine.deterministic=true", "rollout.max_response_tokens=12",
    "eval.bootstrap_resamples=50", *(f"eval.benchmarks.{name}.{key}" for name in ("math", "code", "science", "general")
                                     for key in ("problems=2", "samples=1")),
    *(f"long_cot_sft.{text}" for text in (*SMALL_SFT, "sft.epochs=2")),
    *(f"general_sft.{text}" for text in (*SMALL_SFT, "sft.epochs=1", "sft.examples=32")),
    "choice.select.problems=2", "choice.select.samples=2",
    *(f"math_rl.{text}" for text in (*SMALL_RL, "run.steps=3", "eval.problems=2")),
    *(f"code_science_rl.{text}" for text in (*SMALL_RL, "run.steps=2", *(
        f"eval.benchmarks.{name}.problems=2" for name in ("math", "code", "science")))),
]

RING_MINI = {  # stage -> steps before it is killed
    "base": 0, "cold_start": 6, "choice": 0, "math_rl": 1, "code_rl": 1, "science_rl": 1, "one_model": 1, "adaptive": 1}
SPECIALISTS = ["math_rl", "code_rl", "science_rl"]
SETS = ("math", "code", "science", "low", "high")
SMALL_RING_MINI = [
    "experiment=ring_mini", "parallel=single", "rollout.engine.deterministic=true", "rollout.max_response_tokens=12",
    "eval.bootstrap_resamples=50", *(f"eval.benchmarks.{name}.{key}" for name in SETS
                                     for key in ("problems=2", "samples=1")),
    *(f"cold_start.{text}" for text in (*SMALL_SFT, "sft.epochs=2")),
    "choice.select.problems=2", "choice.select.samples=2",
    *(f"{name}.{text}" for name in (*SPECIALISTS, "one_model", "adaptive") for text in (
        "parallel=single", "run.save_every_steps=1", "run.steps=2", "rollout.prompts_per_step=4",
        "rollout.responses_per_prompt=2", "rollout.max_response_tokens=12", "algo.phi=32",
        "algo.underfull=train_short"))]


@pytest.fixture(scope="module")
def engine_url(quickstart_model, tmp_path_factory):
    config = load(["experiment=ring_lite_tiny", "rollout.engine.deterministic=true"])
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with EngineProcess.from_config(config.rollout, quickstart_model, log_path=log) as engine:
        yield engine.base_url


def command(folder: Path, url: str, *more: str, small: list[str]) -> list[str]:
    return [sys.executable, "-m", "megatron_rl.cli", "pipeline", *small, f"run.dir={folder}",
            f'rollout.engine.urls=["{url}"]', *more]


def to_the_end(folder: Path, url: str, *more: str, small: list[str] = SMALL) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, url, *more, small=small), cwd=ROOT, env=rank_environment(),
                          capture_output=True, text=True, timeout=900)


def kill_at(stage: str, step: int, folder: Path, url: str, small: list[str] = SMALL) -> None:
    """kill -9 when `stage` has begun and `step` steps of it are logged, from when on the engine samples nothing."""
    def reached() -> bool:
        return stage in records(folder) and len(rows(folder / stage)) >= step

    with FaultyProxy(url, hold=reached) as proxy:
        process = subprocess.Popen(command(folder, proxy.url, small=small), cwd=ROOT, env=rank_environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while stage not in records(folder):
            assert process.poll() is None, f"the pipeline ended early:\n{process.stderr.read()}"
            time.sleep(0.05)
        wait_for_rows(folder / stage, step, process)
        kill_launcher(process)


def records(folder: Path) -> dict[str, dict]:
    files = {name: folder / name / "stage.json" for name in (*STAGES, *RING_MINI)}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def results(folder: Path) -> dict[str, dict]:
    """What every stage's model scores, without the clock."""
    return {name: {key: timeless(values) for key, values in record["evaluation"].items()}
            for name, record in records(folder).items()}


@pytest.fixture(scope="module")
def whole(engine_url, tmp_path_factory):
    """Killed in the second epoch of SFT and in the choice, then run to its end."""
    folder = tmp_path_factory.mktemp("pipeline") / "whole"
    kill_at("long_cot_sft", 6, folder, engine_url)
    assert [record["status"] for record in records(folder).values()] == ["finished", "begun"]
    kill_at("choice", 0, folder, engine_url)
    assert [record["status"] for record in records(folder).values()] == ["finished", "finished", "begun"]
    done = to_the_end(folder, engine_url)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_stage_runs_once_each_step_once(whole):
    found = records(whole)
    assert list(found) == STAGES and {record["status"] for record in found.values()} == {"finished"}
    assert {name: record["starts"] for name, record in found.items()} == {
        **dict.fromkeys(STAGES, 1), "long_cot_sft": 2, "choice": 2}
    for name, steps in TRAINED.items():
        assert [row["step"] for row in rows(whole / name)] == list(range(1, steps + 1)), name
    epochs = [json.loads((whole / "long_cot_sft" / "epochs" / f"epoch_{n:02d}" / "epoch.json").read_text())
              for n in (1, 2)]
    assert [epoch["step"] for epoch in epochs] == [4, 8] and epochs[1]["tokens"] > epochs[0]["tokens"]


def test_rl_starts_from_the_epoch_that_the_rule_chose(whole):
    decision = json.loads((whole / "choice" / "selection" / "decision.json").read_text())
    assert (whole / "choice" / "hf").resolve() == Path(decision["chosen"]).resolve()
    config = json.loads((whole / "math_rl" / "config.json").read_text())
    assert config["model"]["path"] == str(whole / "choice" / "hf")
    assert rows(whole / "math_rl")[0]["mismatch/max_abs"] < 1e-4


def test_the_result_and_the_report_hold_every_stage(whole):
    result = json.loads((whole / "pipeline.json").read_text())
    assert result["finished"] and [stage["name"] for stage in result["stages"]] == STAGES and not result["waiting"]
    assert all(set(stage["evaluation"]) == {"math", "code", "science", "general"} for stage in result["stages"])
    assert len(result["stages"][2]["decision"]["candidates"]) == 2
    page = (whole / "report.html").read_text()
    assert page.count("<details>") >= len(TRAINED) + len(STAGES) and "http://127" in page, "configurations are shown"
    for title in ("Accuracy after each stage", "Entropy of the SFT epochs", "Policy entropy", "Versions and machine"):
        assert title in page


def test_a_finished_pipeline_is_not_run_again_and_a_changed_one_is_refused(whole, engine_url):
    before = {name: (whole / name / "stage.json").read_bytes() for name in STAGES}
    done = to_the_end(whole, engine_url)
    assert done.returncode == 0 and "all 6 stages are finished" in done.stdout
    refused = to_the_end(whole, engine_url, "math_rl.run.steps=4")
    assert refused.returncode == 2 and "math_rl.run.steps=4 (was 3)" in refused.stderr
    assert before == {name: (whole / name / "stage.json").read_bytes() for name in STAGES}


def test_killed_in_every_later_stage_it_ends_as_if_it_had_not_been(whole, engine_url):
    """The later stages once more, from the same beginning, with a kill in the middle of each of them."""
    again = STAGES[3:]
    expected = results(whole), {name: [timeless(row) for row in rows(whole / name)] for name in TRAINED}, {
        name: weights_digest(whole / name) for name in again}
    earlier = {name: (whole / name / "stage.json").read_bytes() for name in STAGES[:3]}
    for name in again:
        shutil.rmtree(whole / name)
    for name, step in (("math_rl", 2), ("code_science_rl", 1), ("general_sft", 1)):
        kill_at(name, step, whole, engine_url)
    done = to_the_end(whole, engine_url)
    assert done.returncode == 0, done.stderr
    assert "5 of 6 stages are finished" in done.stdout
    assert earlier == {name: (whole / name / "stage.json").read_bytes() for name in STAGES[:3]}
    assert {name: records(whole)[name]["starts"] for name in again} == dict.fromkeys(again, 2)
    assert expected == (results(whole), {name: [timeless(row) for row in rows(whole / name)] for name in TRAINED}, {
        name: weights_digest(whole / name) for name in again})


def test_ring_mini_killed_in_every_stage_goes_on(engine_url, tmp_path):
    """SFT, choice, specialists, their distillation into one model, and adaptive thinking."""
    folder = tmp_path / "ring_mini"
    for name, step in RING_MINI.items():
        kill_at(name, step, folder, engine_url, SMALL_RING_MINI)
        assert records(folder)[name]["status"] == "begun"
    done = to_the_end(folder, engine_url, small=SMALL_RING_MINI)
    assert done.returncode == 0, done.stderr
    found = records(folder)
    assert {name: record["starts"] for name, record in found.items()} == dict.fromkeys(RING_MINI, 2)
    assert [row["step"] for row in rows(folder / "cold_start")] == list(range(1, 9))
    for name in (*SPECIALISTS, "one_model", "adaptive"):
        assert [row["step"] for row in rows(folder / name)] == [1, 2], name
        assert rows(folder / name)[0]["mismatch/max_abs"] < 1e-4, name
        config = json.loads((folder / name / "config.json").read_text())
        start = "one_model" if name == "adaptive" else "choice"
        assert config["model"]["path"] == str(folder / start / "hf"), name
    assert found["one_model"]["after"] == "+".join(found[name]["id"] for name in ("choice", *SPECIALISTS))
    for row in rows(folder / "one_model"):
        assert row["train/distill_kl"] > -1e-6 and 0 < row["train/distill_teacher_mass"] < 1
    assert 0 < rows(folder / "code_rl")[-1]["prompts/judged_fraction"] < 0.1
    stages = {stage["name"]: stage for stage in json.loads((folder / "pipeline.json").read_text())["stages"]}
    for name in list(RING_MINI)[1:]:
        assert stages[name]["gain"].keys() == stages[name]["evaluation"].keys() == set(SETS), name
        assert all(low <= mean <= high for mean, low, high in stages[name]["gain"].values()), name
    assert "Gain of every stage" in (folder / "report.html").read_text()
