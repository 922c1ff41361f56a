"""From finished runs to verdicts: literal numbers, worked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron_rl.ablations import report
from megatron_rl.ablations.driver import Plan, Run
from megatron_rl.ablations.results import POWER, detectable, judge, mean_and_spread, take, whole_seeds
from megatron_rl.ablations.spec import Ablation, Arm, Column, Panel, PaperTable, Scale, Statement
from megatron_rl.config.load import build, to_dict

STATEMENT = Statement("a is higher", column="score", arm="a", direction="higher", than="b")
VERSIONS = {"python": "3.12", "packages": {"torch": "2"}, "git": None,
            "machine": {"cores": 2, "cpu": "a cpu", "memory_gb": 4.0, "gpus": []}}


@pytest.mark.parametrize(("how", "expected"), [
    ("first", 1.0), ("last", 4.0), ("gain", 3.0), ("mean", 2.5), ("end", 4.0), ("sum", 10.0),
    ("cv", math.sqrt(1.25) / 2.5), ("jitter", math.sqrt(1 / 2) / 2.5)])
def test_steps_become_one_number(how, expected):
    assert take(np.array([1.0, 2.0, 3.0, 4.0]), how) == pytest.approx(expected)
    assert math.isnan(take(np.array([]), how))


def test_jitter_is_the_cv_of_noise_and_leaves_a_trend_out():
    noise = np.random.default_rng(0).normal(1.0, 0.1, 4000)
    trend = np.linspace(-0.5, 0.5, 4000)
    assert take(noise, "jitter") == pytest.approx(take(noise, "cv"), rel=0.05)
    assert take(noise + trend, "jitter") == pytest.approx(take(noise, "cv"), rel=0.05)


def verdict_of(a: list[float], b: list[float], direction: str = "higher"):
    statement = Statement("", column="score", arm="a", direction=direction, than="b")
    return judge(statement, {"a": {"score": a}, "b": {"score": b}})


def test_the_verdict_follows_the_interval_of_paired_differences():
    # differences 1, 2, 3: mean 2, standard deviation 1, half width 4.303 / sqrt(3) = 2.484
    unsure = verdict_of([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert (unsure.low, unsure.high) == (pytest.approx(2 - 2.4843, abs=1e-3), pytest.approx(2 + 2.4843, abs=1e-3))
    assert unsure.verdict == "cannot tell"
    # seeds differ by far more than arms do, which pairing takes out: differences 0.9, 1.0, 1.1
    paired = [10.9, 21.0, 31.1], [10.0, 20.0, 30.0]
    assert verdict_of(*paired).verdict == "supports"
    assert verdict_of(*paired, direction="lower").verdict == "contradicts"
    assert verdict_of([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]).verdict == "cannot tell"


def test_an_arm_alone_is_judged_against_zero():
    statement = Statement("it falls", column="gain", arm="a", direction="lower")
    verdict = judge(statement, {"a": {"gain": [-0.9, -1.0, -1.1]}})
    assert (verdict.verdict, verdict.difference) == ("supports", pytest.approx(-1.0))
    assert judge(statement, {"b": {"gain": [1.0]}}) is None


def test_two_seeds_or_a_missing_number_cannot_tell():
    assert verdict_of([5.0, 5.1], [1.0, 1.0]).verdict == "cannot tell"
    assert verdict_of([5.0, 5.1, math.nan], [1.0, 1.0, 1.0]).verdict == "cannot tell"
    assert judge(STATEMENT, {"a": {"score": [1.0]}}) is None, "a scale without one of the arms says nothing"


@pytest.mark.parametrize("seeds", [3, 8])
def test_the_detectable_difference_is_found_as_often_as_it_says(seeds):
    """20,000 experiments whose true difference is just that; the standard error of a share is 0.003."""
    differences = np.random.default_rng(0).normal(detectable(0.5, seeds), 0.5, (20000, seeds))
    half = {3: 4.3027, 8: 2.3646}[seeds] * differences.std(axis=1, ddof=1) / math.sqrt(seeds)
    assert np.mean(differences.mean(axis=1) - half > 0) == pytest.approx(POWER, abs=0.012)


def test_pilot_seeds_say_what_all_planned_seeds_could_detect():
    # differences 1, 2, 3: standard deviation 1
    table = {"a": {"score": [1.0, 2.0, 3.0]}, "b": {"score": [0.0, 0.0, 0.0]}}
    assert judge(STATEMENT, table).detectable == pytest.approx(detectable(1.0, 3))
    assert judge(STATEMENT, table, seeds=8).detectable == pytest.approx(detectable(1.0, 8))
    assert detectable(1.0, 8) < detectable(1.0, 3)
    assert math.isnan(detectable(1.0, 2)), "two seeds cannot tell anything"


def write_run(root, arm: str, seed: int, *, scores: list[float], steps: int = 2, evaluated: bool = True,
              recipe: str = "rl", **sections) -> Run:
    folder = root / arm / f"seed_{seed}"
    folder.mkdir(parents=True)
    asked = steps if recipe == "rl" else 7  # an sft run takes its steps from section sft
    config = build({"run": {"dir": str(folder), "steps": asked, "seed": seed}, **sections})
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "versions.json").write_text(json.dumps(VERSIONS))
    rows = [{"step": step + 1, "score": value} for step, value in enumerate(scores)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = [{"step": 0, "accuracy": 0.1}] + ([{"step": steps, "accuracy": 0.5}] if evaluated else [])
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in last))
    return Run(arm, seed, config, recipe)


def test_a_spread_over_seeds_that_measured_nothing_is_nan():
    assert mean_and_spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7 ** 0.5))
    assert all(map(math.isnan, mean_and_spread([math.nan, math.nan])))


def test_a_run_is_finished_when_its_last_evaluation_is_there(tmp_path):
    done = write_run(tmp_path, "a", 0, scores=[1.0, 2.0])
    killed = write_run(tmp_path, "a", 1, scores=[1.0, 2.0], evaluated=False)
    assert done.finished() and not killed.finished() and killed.begun()
    assert whole_seeds(Plan(tmp_path, (), (done, killed))) == [0]


def test_a_run_that_ended_before_its_last_step_is_finished(tmp_path):
    """At a plateau, or without prompts that teach. It would be run again and again, and no seed be whole."""
    early = write_run(tmp_path, "a", 0, scores=[1.0, 2.0], steps=5, evaluated=False)
    assert not early.finished()
    with (early.folder / "eval.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "label": "after_rl", "accuracy": 0.5}) + "\n")
    assert early.finished() and whole_seeds(Plan(tmp_path, (), (early,))) == [0]
    prepared = Run(None, 0, early.config)
    assert not prepared.finished()
    (early.folder / "hf").mkdir()
    (early.folder / "hf" / "config.json").touch()
    assert prepared.finished()


def test_a_supervised_arm_is_finished_when_it_is_evaluated_and_samples_when_all_are_written(tmp_path):
    sft = {"epochs": 1, "examples": 32, "batch_size": 16}
    run = write_run(tmp_path, "a", 0, scores=[1.0, 2.0], recipe="sft", sft=sft)
    assert run.config.run.steps == 7 and run.steps == 2 and run.finished()
    samples = Run(None, 0, run.config, "evaluate")
    assert not samples.finished()
    (run.folder / "evaluation.json").write_text("{}")
    assert samples.finished()


def test_a_folder_with_another_run_is_refused_by_the_key_that_differs(tmp_path):
    run = write_run(tmp_path, "a", 0, scores=[1.0])
    other = Run("a", 0, build({"run": {"dir": str(run.folder), "steps": 2, "seed": 0}, "optimizer": {"lr": 1e-4}}))
    with pytest.raises(ValueError, match=r"optimizer\.lr.*out="):
        other.finished()


def test_the_result_has_table_figure_verdict_and_goes_between_the_readmes_markers(tmp_path, monkeypatch):
    ablation = Ablation(
        title="A and B", arms={"a": "Arm A", "b": "Arm B"}, scales={"tiny": Scale(arms={"a": Arm(), "b": Arm()})},
        columns=(Column("score", "score", "last"), Column("gain", "held_out/accuracy", "gain"),
                 Column("of another scale", "held_out/aime24/accuracy", "last")),
        panels=(Panel("Score", "points", metric="score"), Panel("Gain", "x", column="gain", paper={"a": 3.0})),
        statements=(STATEMENT,), paper=PaperTable("Table 9:", ("x",), {"theirs": ("36.60 (+1)",)}))
    runs = [write_run(tmp_path, arm, seed, scores=[0.0, value + seed])
            for seed in range(3) for arm, value in (("a", 2.0), ("b", 1.0))]
    runs.append(write_run(tmp_path, "a", 3, scores=[0.0, 9.0]))
    runs.append(write_run(tmp_path, "b", 3, scores=[0.0], evaluated=False))
    text = report.write_result(ablation, Plan(tmp_path, (), tuple(runs)), tmp_path / "out", scale="tiny", command="it")
    # seeds 0, 1, 2 of a end at 2, 3, 4; seed 3 lacks an arm and is not counted
    assert "| Arm A | 3.000 +- 1.000 | 0.400 +- 0.000 |" in text
    assert "| a is higher | +1 | +1 to +1 | **supports** | 0 |" in text
    assert "Not run to its end" in text and "| theirs | 36.60 (+1) |" in text
    assert (tmp_path / "out" / "figure.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["values"]["a"]["of another scale"] == [None] * 3
    assert result["values"]["a"]["score"] == [2.0, 3.0, 4.0] and result["verdicts"][0]["verdict"] == "supports"

    monkeypatch.setattr(report, "EXAMPLES", tmp_path)
    readme = tmp_path / "ours" / "README.md"
    readme.parent.mkdir()
    readme.write_text("Before.\n<!-- result: tiny -->\nold\n<!-- end: tiny -->\nAfter.\n")
    for _ in range(2):  # again: replaced, not appended
        report.publish("ours", tmp_path / "out", scale="tiny")
    assert readme.read_text() == f"Before.\n<!-- result: tiny -->\n{text}<!-- end: tiny -->\nAfter.\n"
    assert (readme.parent / "result-tiny.png").is_file()
    with pytest.raises(ValueError, match="result: paper"):
        report.publish("ours", tmp_path / "out", scale="paper")


def test_nothing_is_claimed_while_no_seed_is_whole(tmp_path):
    runs = (write_run(tmp_path, "a", 0, scores=[1.0, 2.0]), write_run(tmp_path, "b", 0, scores=[1.0], evaluated=False))
    assert report.write_result(Ablation(), Plan(tmp_path, (), runs), tmp_path, scale="tiny", command="") is None
