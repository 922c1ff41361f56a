"""The ablations of examples/: each composes at each scale, and mistakes are named."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from megatron_rl.ablations import spec
from megatron_rl.ablations.driver import plan, sharing_engines
from megatron_rl.cli import main
from megatron_rl.config.show import differences


@pytest.mark.parametrize("name", spec.names())
def test_every_example_has_a_readme_with_room_for_each_scale_that_runs_here(name):
    ablation = spec.load_ablation(name)
    readme = (spec.EXAMPLES / name / "README.md").read_text(encoding="ascii")
    assert "<!-- result: tiny -->" in readme and "<!-- end: tiny -->" in readme
    assert len(ablation.scales["tiny"].seeds) >= 3 and ablation.statements and ablation.panels


@pytest.mark.slow
@pytest.mark.parametrize("name", spec.names())
def test_every_scale_of_every_example_is_valid(name):
    scales = spec.load_ablation(name).scales
    assert "tiny" in scales
    for scale in scales:
        assert main(["ablate", name, f"scale={scale}", "seeds=0", "--check"]) == 0


def test_arms_differ_in_what_they_compare_and_in_nothing_else():
    tiny = spec.load_ablation("fig7_8_c3po_vs_grpo").scales["tiny"]
    todo = plan("x", "tiny", tiny, out=Path("runs"), seeds=[1], arms=["c3po", "grpo"])
    ours, theirs = (run.config for run in todo.runs)
    assert (ours.algo.objective, theirs.algo.objective) == ("c3po", "grpo")
    assert ours.algo.loss == theirs.algo.loss and ours.optimizer == theirs.optimizer
    assert ours.rollout == theirs.rollout and ours.run.seed == theirs.run.seed == 1
    assert ours.model.path == theirs.model.path == str(todo.starts[0].folder / "hf")


def test_the_search_for_a_collapse_compares_objectives_in_every_setting():
    ablation = spec.load_ablation("grpo_collapse")
    tiny = ablation.scales["tiny"]
    settings = {arm.removesuffix("_grpo") for arm in tiny.arms if arm.endswith("_grpo")}
    assert len(settings) == 8
    compared = {(statement.arm, statement.than) for statement in ablation.statements}
    for setting in settings:
        todo = plan("x", "tiny", tiny, out=Path("runs"), seeds=[0], arms=[f"{setting}_grpo", f"{setting}_c3po"])
        grpo, c3po = (run.config for run in todo.runs)
        same = {"run.name", "run.dir", "algo.objective", "algo.phi"}
        assert {key for key, *_ in differences(grpo, c3po)} <= same
        assert c3po.algo.phi * c3po.algo.updates_per_rollout == 4096
        assert compared >= {(f"{setting}_grpo", None), (f"{setting}_c3po", f"{setting}_grpo")}


@pytest.mark.parametrize(("text", "message"), [
    ("titel: x", r"unknown key titel \(did you mean title\?\)"),
    ("scales: {tiny: {arms: {a: {}}}}", "no label under arms for a"),
    ("scales: {tiny: {arms: {a: {start: s}}}}", "start: s, which is not under starts"),
    ("columns: [{label: x, metric: y, take: median}]", "take=median must be one of"),
    ("statements: [{column: score}]", "column 'score' is not under columns"),
    ("panels: [{title: both, metric: a, column: b}]", "'both' needs metric or column"),
])
def test_a_mistake_in_an_ablation_names_file_and_key(tmp_path, monkeypatch, text, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ablation.yaml").write_text(text)
    monkeypatch.setattr(spec, "EXAMPLES", tmp_path)
    with pytest.raises(ValueError, match=f"mine/ablation.yaml.*{message}"):
        spec.load_ablation("mine")


@pytest.mark.parametrize(("settings", "message"), [
    (["scale=huge"], "scale=huge: fig7_8_c3po_vs_grpo has tiny, paper"),
    (["seeds=a"], "seeds=a must be numbers"),
    (["arms=ppo"], "arms=ppo: fig7_8_c3po_vs_grpo, scale tiny has c3po"),
])
def test_a_wrong_setting_is_refused_before_anything_starts(settings, message, capsys):
    assert main(["ablate", "fig7_8_c3po_vs_grpo", *settings]) == 2
    assert message in capsys.readouterr().err


def test_arms_share_engines_where_one_can_serve_them_and_seeds_stay_together():
    scale = spec.Scale(arms={"a": spec.Arm(), "b": spec.Arm(), "c": spec.Arm(overrides=("model.dtype=bfloat16",))})
    todo = plan("x", "tiny", scale, out=Path("runs"), seeds=[0, 1], arms=["a", "b", "c"])
    assert [[f"{run.arm}{run.seed}" for run in runs] for runs in sharing_engines(todo.runs)] == [
        ["a0", "b0"], ["c0"], ["a1", "b1"], ["c1"]]


def test_the_files_of_the_three_domains_are_what_the_script_writes():
    script = runpy.run_path(str(spec.EXAMPLES / "table3_domain_conflict" / "problems.py"))
    for domain in ("code", "science"):
        assert (script["FOLDER"] / f"{domain}.jsonl").read_text() == script["lines"](domain)
