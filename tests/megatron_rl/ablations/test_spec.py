"""The ablations of examples/: each composes at each scale, and mistakes are named."""

from __future__ import annotations

import runpy

import pytest

from megatron_rl.ablations import spec
from megatron_rl.ablations.driver import plan
from megatron_rl.cli import main


@pytest.mark.parametrize("name", spec.names())
def test_every_example_has_a_readme_with_room_for_each_scale_that_runs_here(name):
    ablation = spec.load_ablation(name)
    readme = (spec.EXAMPLES / name / "README.md").read_text(encoding="ascii")
    assert "<!-- result: tiny -->" in readme and "<!-- end: tiny -->" in readme
    assert len(ablation.scales["tiny"].seeds) >= 3 and ablation.statements and ablation.panels


@pytest.mark.slow
@pytest.mark.parametrize("name", spec.names())
def test_every_scale_of_every_example_is_valid(name):
    for scale in spec.load_ablation(name).scales:
        assert main(["ablate", name, f"scale={scale}", "seeds=0", "--check"]) == 0


def test_arms_differ_in_what_they_compare_and_in_nothing_else():
    tiny = spec.load_ablation("fig7_8_c3po_vs_grpo").scales["tiny"]
    todo = plan("x", "tiny", tiny, out=spec.Path("runs"), seeds=[1], arms=["c3po", "grpo"])
    ours, theirs = (run.config for run in todo.runs)
    assert (ours.c3po.objective, theirs.c3po.objective) == ("c3po", "grpo")
    assert ours.c3po.loss == theirs.c3po.loss and ours.optimizer == theirs.optimizer
    assert ours.rollout == theirs.rollout and ours.run.seed == theirs.run.seed == 1
    assert ours.model.path == theirs.model.path == str(todo.starts[0].folder / "hf")


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


def test_arms_that_need_different_engines_are_refused():
    scale = spec.Scale(arms={"a": spec.Arm(overrides=("model.dtype=bfloat16",)), "b": spec.Arm()})
    with pytest.raises(ValueError, match="must not differ in rollout.engine, model.dtype"):
        plan("x", "tiny", scale, out=spec.Path("runs"), seeds=[0], arms=["a", "b"])


def test_the_files_of_the_three_domains_are_what_the_script_writes():
    script = runpy.run_path(str(spec.EXAMPLES / "table3_domain_conflict" / "problems.py"))
    for domain in ("code", "science"):
        assert (script["FOLDER"] / f"{domain}.jsonl").read_text() == script["lines"](domain)
