"""The ablations of examples/: each composes at each scale, and mistakes are named."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from megatron_rl.ablations import command, spec
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


def test_ratios_of_three_units_are_compared_at_one_budget_with_the_clip_ranges_of_their_papers():
    tiny = spec.load_ablation("lpo_gspo_token").scales["tiny"]
    todo = plan("x", "tiny", tiny, out=Path("runs"), seeds=[0], arms=list(tiny.arms))
    token, lpo, gspo, gspo_wide = (run.config for run in todo.runs)
    for other in (lpo, gspo, gspo_wide):
        assert {key for key, *_ in differences(token, other)} == {
            "run.name", "run.dir", "algo.loss.surrogate", "algo.loss.clip_eps_low", "algo.loss.clip_eps_high"}
    assert [(each.algo.loss.surrogate, each.algo.loss.clip_eps_low, each.algo.loss.clip_eps_high)
            for each in (token, lpo, gspo, gspo_wide)] == [
        ("ppo", 0.2, 0.2), ("lpo", 0.03, 0.03), ("gspo", 3e-4, 4e-4), ("gspo", 0.03, 0.03)]
    assert token.algo.updates_per_rollout > 1, "with one update every ratio is 1"
    worked = " so3+7=10 then10-1=9 so\\boxed{9}"
    assert re.split(token.algo.sentence_end, worked) == [" so3+7=1", " then10-1=", " so\\boxed{9}"]


def test_specialists_and_their_distillation_train_on_as_many_tokens_as_mixed_rl():
    tiny = spec.load_ablation("specialists_vs_mixed").scales["tiny"]
    todo = plan("x", "tiny", tiny, out=Path("runs"), seeds=[0], arms=["one_model", "mixed"])
    trained = {run.config.run.name: run.steps * run.config.algo.phi_global(run.config.parallel.dp)
               for run in (*todo.starts, *todo.runs) if run.recipe == "rl"}
    mixed = trained.pop("mixed_seed_0")
    assert len(trained) == 4 and sum(trained.values()) == mixed
    assert set(todo.runs[0].config.algo.distillation.routes) == {"math", "code", "science"}


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
    ("scales: {tiny: {arms: {a: {start: s}}}}", "arm a has start: s, which is not under starts"),
    ("scales: {tiny: {prepared: {p: {start: q}, q: {}}, arms: {a: {}}}}", "run p has start: q.*nor under prepared"),
    ("scales: {tiny: {starts: {p: []}, prepared: {p: {}}, arms: {a: {}}}}", "p is under starts and under prepared"),
    ("scales: {tiny: {arms: {a: {teachers: {math: t}}}}}", "arm a has teachers: t, which is not under starts"),
    ("scales: {tiny: {starts: {t: []}, arms: {a: {recipe: sft, teachers: {math: t}}}}}", "teachers.*for recipe: rl"),
    ("scales: {tiny: {starts: {t: []}, arms: {a: {responses_of: t}}}}", "responses_of, which is for recipe: sft"),
    ("scales: {tiny: {starts: {t: []}, arms: {a: {recipe: sft, responses_of: t}}}}", "a model and no responses"),
    ("scales: {tiny: {prepared: {e: {recipe: evaluate}}, arms: {a: {start: e}}}}", "responses and no model"),
    ("scales: {tiny: {arms: {a: {recipe: evaluate}}}}", "recipe: evaluate, which is for prepared runs"),
    ("scales: {tiny: {arms: {a: {recipe: dpo}}}}", "recipe=dpo must be one of"),
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
    (["scale=huge"], "scale=huge: fig7_8_c3po_vs_grpo has tiny, tail, paper"),
    (["seeds=a"], "seeds=a must be numbers"),
    (["arms=ppo"], "arms=ppo: fig7_8_c3po_vs_grpo, scale tiny has c3po"),
    (["rollout.top_p=0.9", "algo.mismatch=tis"], "c3po: rollout.top_p < 1 changes the sampled distribution"),
    (["algo.hooks.advantage=no.such"], "c3po: algo.hooks.advantage"),
])
def test_a_wrong_setting_is_refused_before_anything_starts(settings, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "run_all", lambda *_: pytest.fail("something was started"))
    assert main(["ablate", "fig7_8_c3po_vs_grpo", *settings]) == 2
    assert message in capsys.readouterr().err


STUDENTS = spec.Scale(
    starts={"young": ("experiment=quickstart_sft",), "old": ("experiment=quickstart_sft", "sft.epochs=9")},
    common=("experiment=quickstart",),
    prepared={"teacher": spec.Arm(start="old", overrides=("experiment=quickstart",)),
              "responses": spec.Arm("evaluate", start="teacher", overrides=("experiment=quickstart",))},
    arms={"plain": spec.Arm(start="young"),
          "taught": spec.Arm(start="young", teachers={"math": "teacher"}),
          "told": spec.Arm("sft", start="young", responses_of="responses")})


def plan_of(arms: list[str], **settings):
    return plan("x", "tiny", STUDENTS, out=Path("runs"), seeds=[1], arms=arms, **settings)


def test_arms_learn_from_runs_that_are_prepared_once():
    todo = plan_of(["taught", "told"])
    taught, told = (run.config for run in todo.runs)
    starts = Path("runs/x/tiny/starts")
    assert [(run.config.run.name, run.recipe) for run in todo.starts] == [
        ("young", "sft"), ("old", "sft"), ("teacher", "rl"), ("responses", "evaluate")]
    assert taught.algo.distillation.checkpoints == {
        "algo.distillation.teachers.teacher.checkpoint": str(starts / "teacher" / "hf")}
    assert taught.algo.distillation.routes == {"math": "teacher"}
    assert taught.model.path == told.model.path == str(starts / "young" / "hf")
    assert told.data.path == str(starts / "responses" / "evaluation_samples.jsonl")
    assert (told.data.source, told.data.response_key) == ("jsonl", "text")
    assert todo.runs[1].steps == told.sft.total_steps and told.run.export_hf and not taught.run.export_hf
    teacher, responses = (run.config for run in todo.starts[2:])
    assert (teacher.model.path, responses.model.path) == (str(starts / "old" / "hf"), str(starts / "teacher" / "hf"))


@pytest.mark.parametrize(("arms", "start", "expected"), [
    (["plain"], None, ["young"]), (["taught"], None, ["young", "old", "teacher"]), (["plain"], "here", []),
    (["told"], "here", ["teacher", "responses"])])
def test_only_what_the_chosen_arms_need_is_prepared(arms, start, expected):
    todo = plan_of(arms, start=start)
    assert [run.config.run.name for run in todo.starts] == expected
    assert start is None or {run.config.model.path for run in (*todo.runs, *todo.starts[:1])} == {start}
    assert all(run.config.model.path == "runs/x/tiny/starts/teacher/hf" for run in todo.starts
               if run.recipe == "evaluate"), "start stands for supervised starts, not for the teacher"


def test_arms_share_engines_where_one_can_serve_them_and_seeds_stay_together():
    scale = spec.Scale(arms={"a": spec.Arm(), "b": spec.Arm(), "c": spec.Arm(overrides=("model.dtype=bfloat16",))})
    todo = plan("x", "tiny", scale, out=Path("runs"), seeds=[0, 1], arms=["a", "b", "c"])
    assert [[f"{run.arm}{run.seed}" for run in runs] for runs in sharing_engines(todo.runs)] == [
        ["a0", "b0"], ["c0"], ["a1", "b1"], ["c1"]]


def test_the_files_of_the_three_domains_are_what_the_script_writes():
    script = runpy.run_path(str(spec.EXAMPLES / "table3_domain_conflict" / "problems.py"))
    for domain in ("code", "science"):
        assert (script["FOLDER"] / f"{domain}.jsonl").read_text() == script["lines"](domain)
