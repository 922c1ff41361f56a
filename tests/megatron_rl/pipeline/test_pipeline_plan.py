"""What a pipeline's stages are composed of, and what is refused before anything starts."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_rl.config.load import load
from megatron_rl.config.show import differences
from megatron_rl.data.problems import in_split
from megatron_rl.model.architectures import read_config
from megatron_rl.pipeline.check import branches, check, check_memories, check_start
from megatron_rl.pipeline.plan import GIVEN, plan
from megatron_rl.plan import plan_memory
from megatron_rl.recipes.quickstart import make_random_model

FILES = Path(__file__).resolve().parents[3] / "examples" / "ring_lite_tiny" / "problems.py"


@pytest.fixture(scope="module")
def tiny():
    return plan(["experiment=ring_lite_tiny", "run.seed=3", "run.dir=runs/here", "rollout.engine.threads=2",
                 "math_rl.run.steps=7", "code_science_rl.parallel=dp2"])


def test_every_stage_begins_from_the_model_of_the_one_before(tiny):
    assert [stage.name for stage in tiny.stages] == [
        "base", "long_cot_sft", "choice", "math_rl", "code_science_rl", "general_sft"]
    assert all(after.config.model.path == str(before.model)
               for before, after in zip(tiny.stages, tiny.stages[1:], strict=False))
    assert all(stage.model == Path("runs/here") / stage.name / "hf" for stage in tiny.stages)


def test_seed_and_engine_hold_for_all_and_a_stages_keys_for_it_alone(tiny):
    assert {stage.config.run.seed for stage in tiny.stages} == {3}
    assert {stage.config.rollout.engine.threads for stage in tiny.stages} == {2}
    configs = {stage.name: stage.config for stage in tiny.stages}
    assert (configs["math_rl"].run.steps, configs["code_science_rl"].run.steps) == (7, 50)
    assert (configs["math_rl"].parallel.ep, configs["code_science_rl"].parallel.ep) == (2, 1)


def test_the_choice_is_made_on_the_prompts_of_the_rl_stage_after_it(tiny):
    choice, rl = (next(stage.config for stage in tiny.stages if stage.name == name) for name in ("choice", "math_rl"))
    assert {key for key, *_ in differences(choice, rl)} == {"run.dir", "run.name", "model.path", "select.folder"}
    assert choice.select.folder == "runs/here/long_cot_sft"


def test_a_choice_is_made_from_the_sft_stage_whose_epochs_it_takes():
    """Also with a stage between them that does not start from it."""
    _, first, aside, choice, _ = plan([
        "experiment=quickstart", "pipeline.stages={first: {recipe: sft, overrides: ['experiment=quickstart_sft']}, "
        "aside: {after: base}, choice: {recipe: select}, more: {}}", "first.sft.export_epochs=true"]).stages
    assert (aside.sources, choice.sources) == (("base",), ("first",))
    assert (choice.config.model.path, choice.config.select.folder) == (str(first.model), str(first.folder))


def test_a_choice_before_a_stage_with_teachers_asks_none_of_them():
    taught = plan(["experiment=ring_lite_tiny", "pipeline.stages.math_rl.teachers={math: base}",
                   "math_rl.algo.distillation.top_k=4"])
    _, _, choice, rl, *_ = taught.stages
    assert (choice.config.algo.distillation.on, rl.config.algo.distillation.top_k) == (False, 4)
    assert (choice.sources, rl.sources) == (("long_cot_sft",), ("choice", "base"))
    check(taught)


def test_every_domain_that_a_stage_meets_has_a_judge(tiny):
    for config in (*(stage.config for stage in tiny.stages), load(["experiment=domains"])):
        if config.sft != type(config.sft)():
            continue  # nothing is judged in supervised fine-tuning
        domains = {"math", *config.data.mix, *config.eval.benchmarks}
        assert domains <= config.reward.routes.keys(), config.run.name


def test_the_papers_stages_are_the_papers_files_and_valid_for_256_gpus():
    paper = plan(["experiment=ring_lite"])
    check(paper)
    for name, file in (("long_cot_sft", "sft"), ("math_rl", "rl_stage1"), ("code_science_rl", "rl_stage2")):
        (config,) = (stage.config for stage in paper.stages if stage.name == name)
        other = [key for key, *_ in differences(load([f"experiment=ring_lite_{file}"]), config) if key not in GIVEN]
        assert all(key.startswith("rollout.engine.") for key in other), name  # the pipeline's engine is the RL stages'
        assert config.parallel.world_size == 256


@pytest.mark.parametrize("experiment", ["ring_mini", "ring_mini_2"])
def test_specialists_start_from_one_model_and_teach_it(experiment):
    """ring_mini_2 is valid for 256 GPUs."""
    ring = plan([f"experiment={experiment}", "run.dir=runs/here"])
    check(ring)
    stages = {stage.name: stage for stage in ring.stages}
    assert [stages[name].after for name in stages] == ["", "base", "cold_start", *["choice"] * 4, "one_model"]
    for name, stage in list(stages.items())[1:]:
        assert stage.config.model.path == str(stages[stage.after].model), name
        assert stage.recipe == "select" or stage.config.parallel.world_size == {"ring_mini": 2, "ring_mini_2": 256}[
            experiment], name
    teaching = stages["one_model"].config.algo.distillation
    assert {name: each.checkpoint for name, each in teaching.teachers.items()} == {
        name: str(stages[name].model) for name in ("math_rl", "code_rl", "science_rl")}
    assert teaching.routes == {"math": "math_rl", "code": "code_rl", "science": "science_rl"}
    assert branches(ring) == [
        "code_rl starts from the model of choice", "science_rl starts from the model of choice",
        "one_model starts from the model of choice, taught by math_rl, code_rl, science_rl"]
    assert stages["choice"].config.select.rule == "pass_at_k"


def test_the_engine_serves_the_longest_context_of_any_stage():
    longer = plan(["experiment=ring_lite_tiny", "math_rl.rollout.max_context_tokens=160",
                   "long_cot_sft.rollout.max_context_tokens=300"])
    assert longer.engine_config.rollout.max_context_tokens == 160  # SFT asks no engine


@pytest.mark.parametrize(("overrides", "message"), [
    (["foo.run.steps=3"], r"foo\.run\.steps=3: neither a section .* nor a stage; the stages are long_cot_sft, choice"),
    (["math_rl.run.dir=x"], r"math_rl\.run\.dir follows from the pipeline: set run\.dir"),
    (["pipeline.stages.math_rl.overrides=['run.seed=7']"], r"math_rl\.run\.seed follows from the pipeline: set"),
    (["pipeline.stages.math_rl.overrides=['rollout.engine.threads=3']"], r"math_rl\.rollout\.engine\.threads follows"),
    (["math_rl.algo.fi=3"], r"stage math_rl: unknown key algo\.fi"),
    (["long_cot_sft.sft.export_epochs=false"], "stage long_cot_sft: choice .* needs sft.export_epochs=true"),
    (["code_science_rl.model.dtype=bfloat16"], "stage code_science_rl: model.dtype=bfloat16.* one engine"),
    (["pipeline.random_base=false"], "model.path is not set"),
    (["pipeline.stages.data={recipe: sft}"], "pipeline.stages.data: there is a section of that name"),
    (["pipeline.stages.Last={recipe: sft}"], "pipeline.stages: 'Last' must be a word of lower-case letters"),
    (["pipeline.stages.general_sft.after=later"], r"general_sft.after=later is no earlier stage: base, long_cot_sft"),
    (["pipeline.stages.general_sft.after=general_sft"], "after=general_sft is no earlier stage"),
    (["pipeline.stages.math_rl.teachers={math: code_science_rl}"], "teachers.math=code_science_rl is no earlier stage"),
    (["pipeline.stages.general_sft.teachers={math: math_rl}"], "general_sft.teachers are for recipe=rl, not sft"),
    (["pipeline.stages.choice.after=base"], "choice.after=base: recipe=select takes an epoch of the last sft stage"),
    (["pipeline.stages.again={recipe: select}"], "again.recipe=select needs an rl stage after it"),
])
def test_a_mistake_is_named_before_anything_starts(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan(["experiment=ring_lite_tiny", *overrides])


@pytest.mark.parametrize(("overrides", "message"), [
    (["math_rl.algo.phi=1000000"], r"stage math_rl: algo\.phi: 1000000 response tokens"),
    (["math_rl.model.lora.rank=8", "math_rl.model.lora.path=x"], "stage choice: model.lora.path=x: engines would"),
    (["model.lora.rank=8", "model.lora.path=x"], "stage base: model.lora.path=x: engines would serve"),
    (["math_rl.model.lora.rank=8", "math_rl.rollout.publish=adapter"],
     "stage math_rl: rollout.publish=adapter: one engine serves every stage"),
    (["code_science_rl.algo.hooks.advantage=no.such"], "stage code_science_rl: algo.hooks.advantage"),
    (["math_rl.reward.shaping=[{term: no.such}]"], "stage math_rl: reward.shaping"),
    (["observe.loggers=[no.Such]"], "stage base: observe.loggers"),
    (["eval.functions=[no.such]"], "stage base: eval.functions"),
])
def test_a_stage_that_cannot_work_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        check(plan(["experiment=ring_lite_tiny", *overrides]))


def test_the_frozen_policy_of_a_later_stage_is_looked_at_before_the_first_one_starts(tmp_path):
    """Unless an earlier stage leaves it."""
    make_random_model(tmp_path / "base" / "hf", seed=0)
    given = ["experiment=ring_lite_tiny", f"run.dir={tmp_path}", "code_science_rl.algo.loss.kl_coef=0.1"]
    check_start(plan([*given, f"code_science_rl.model.reference_path={tmp_path}/math_rl/hf"]), [4])
    with pytest.raises(ValueError, match=r"stage code_science_rl: model.reference_path=.*nowhere"):
        check_start(plan([*given, f"code_science_rl.model.reference_path={tmp_path}/nowhere"]), [4])


def test_a_stage_whose_teachers_do_not_fit_is_named_before_the_first_one_starts(tmp_path, monkeypatch):
    make_random_model(tmp_path / "base" / "hf", seed=0)
    ring = plan(["experiment=ring_mini", f"run.dir={tmp_path}"])
    places = range(1, len(ring.stages))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=0))
    with pytest.raises(ValueError, match="^stage math_rl: weights, gradients"):
        check_memories(ring, places)
    one = plan_memory(read_config(tmp_path / "base" / "hf"), ring.stages[3].config)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2 * one.stays))
    with pytest.raises(ValueError, match="^stage one_model: weights, gradients"):
        check_memories(ring, places)


def test_a_base_checkpoint_of_ones_own_is_where_the_first_stage_begins(tmp_path):
    own = plan(["experiment=ring_lite_tiny", f"model.path={tmp_path}"])
    assert own.stages[0].model == tmp_path and own.stages[1].config.model.path == str(tmp_path)


def test_the_files_of_the_general_stage_are_what_the_script_writes_and_hold_nothing_out():
    script = runpy.run_path(str(FILES))
    for name in ("general", "replay"):
        assert (FILES.parent / f"{name}.jsonl").read_text() == script["lines"](script[name]())
    assert all(in_split(row["prompt"], "train") for row in script["replay"]())


def test_the_files_of_the_efforts_are_what_the_script_writes():
    folder = FILES.parents[1] / "ring_mini"
    script = runpy.run_path(str(folder / "problems.py"))
    for effort in ("low", "high"):
        assert (folder / f"{effort}.jsonl").read_text() == script["lines"](effort)


