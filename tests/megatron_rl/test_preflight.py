"""What is refused, or said, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from megatron_rl.cli import main, parse
from megatron_rl.config.load import load, to_dict
from megatron_rl.launch import slurm
from megatron_rl.model.architectures import read_config
from megatron_rl.model.slots import count_parameters
from megatron_rl.plan import plan_memory
from megatron_rl.preflight import (
    check_devices,
    check_memory,
    network_of,
    warn_of_seen_problems,
    warn_of_shared_gpus,
)
from megatron_rl.recipes import quickstart
from megatron_rl.recipes.quickstart import make_random_model
from tests.tiny_models import write_tiny_bailing


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory there")
def test_a_run_that_cannot_fit_is_refused_and_one_that_might_not_is_warned_about(tmp_path, monkeypatch, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    config = load([f"model.path={model}", "parallel=dp2"])
    plan = plan_memory(read_config(config.model.path), config)

    def on_a_machine_of(total: int) -> str:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total))
        check_memory(config)
        return capsys.readouterr().err

    with pytest.raises(ValueError, match="parallel.world_size=2 ranks take .*`megatron-rl plan`"):
        on_a_machine_of(2 * plan.stays - 1)
    assert "at their peak" in on_a_machine_of(2 * plan.stays)
    assert on_a_machine_of(2 * plan.total) == ""
    teacher = f"algo.distillation.teachers:{{a:{{checkpoint:'{model}'}}}}"
    config = load([f"model.path={model}", "parallel=dp2", "run.steps=2", f"stages=[{{name:a,steps:1}},{{name:b,steps:1,"
                   f"set:{{{teacher}}}}}]"])
    with pytest.raises(ValueError, match="parallel.world_size=2 ranks take"):
        on_a_machine_of(2 * plan.stays)  # which a later stage with a teacher exceeds


@pytest.mark.parametrize(("experiment", "how"), [("quickstart", "make quickstart"), ("smollm2", "convert smollm2")])
def test_a_model_still_to_be_made_is_said_with_the_command_that_makes_it(experiment, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"model.path=.* is not there yet: `.*{how}"):
        network_of(load([f"experiment={experiment}"]))


@pytest.mark.parametrize(("model", "family", "parameters"), [
    ([], "bailing_moe", 630_624), (["model=bailing_moe_v2"], "bailing_moe_v2", 630_848)])
def test_every_stage_of_the_quick_start_takes_the_random_model_of_each_family(model, family, parameters, tmp_path):
    """docs/quickstart.md has the counts."""
    options = parse(["quickstart", *model, "run.seed=1"])
    assert (options.model, options.overrides) == (family, ["run.seed=1"])
    make_random_model(tmp_path / "init", 1, model_type=options.model)
    network = read_config(tmp_path / "init")
    assert network.model_type == family and count_parameters(network)[0] == parameters
    for command, experiment in (("sft", "quickstart_sft"), ("rl", "quickstart")):
        assert main([command, "--check", f"experiment={experiment}", f"model.path={tmp_path / 'init'}",
                     f"run.dir={tmp_path / command}"]) == 0


@pytest.mark.parametrize(("override", "message"), [
    ("rollout.responses_per_prompt=1", "rollout.responses_per_prompt=1"),
    ("algo.hooks.advantage=no.such", "algo.hooks.advantage")])
def test_the_quick_start_refuses_a_wrong_setting_before_it_makes_anything(override, message, tmp_path, monkeypatch,
                                                                          capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "make_random_model", lambda *_, **__: pytest.fail("a model was made"))
    assert main(["quickstart", override]) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


def _without_weights(model):
    for file in model.glob("*.safetensors"):
        file.unlink()


def _cut_short(model):
    file = next(model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


DAMAGES = {
    "config.json is not JSON": lambda model: (model / "config.json").write_text("{"),
    "no *.safetensors file": _without_weights,
    "is damaged or cut short": _cut_short,
}


@pytest.mark.parametrize("command", ["rl", "sft"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_before_anything_starts(damage, command, tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    DAMAGES[damage](model)
    assert main([command, f"model.path={model}", f"run.dir={tmp_path / 'run'}"]) == 2
    assert str(model) in (said := capsys.readouterr().err) and damage in said


def test_a_reference_that_is_no_checkpoint_is_named_by_its_key(tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    assert main(["rl", f"model.path={model}", "model.reference_path=nowhere", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "model.reference_path=nowhere: no *.safetensors file" in capsys.readouterr().err


def test_a_run_in_place_of_its_model_is_answered_with_the_folder_of_the_model(tmp_path):
    (tmp_path / "config.json").write_text('{"run": {}}')
    write_tiny_bailing(tmp_path / "hf")
    with pytest.raises(ValueError, match=f"is a run's folder; the model that it wrote is {tmp_path}/hf"):
        network_of(load([f"model.path={tmp_path}"]))


REFUSED = {
    "a misspelt scorer": (["reward.routes.math=math_verfy"], "math=math_verfy is no scorer; did you mean"),
    "a scorer that is not there": (["reward.routes.math=tests.rewards.brief"], "module tests.rewards has no brief"),
    "a data file that is not there": (["data.path=nowhere.jsonl"], "data.path=nowhere.jsonl is not a file"),
    "a resume of nothing": (["resume=true"], "holds no run: correct run.dir"),
    "a reward that raises for every response": (
        ["data.source=chains", "reward.routes.math=tests.rewards.raises"],
        "reward.routes.math=tests.rewards.raises cannot judge a response to problem chains-"),
    "a reward that is text": (["data.source=chains", "reward.routes.math=tests.rewards.in_words"],
                              "returned 'right': not a number between"),
}


@pytest.mark.parametrize("options", [["--check"], []])
@pytest.mark.parametrize("mistake", REFUSED)
def test_what_a_run_is_refused_for_a_check_finds_too(mistake, options, tmp_path, capsys):
    model, (overrides, said) = write_tiny_bailing(tmp_path / "model"), REFUSED[mistake]
    assert main(["rl", *options, f"model.path={model}", f"run.dir={tmp_path / 'run'}", *overrides]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "engine.log").exists()


def test_a_check_finds_an_earlier_run_wherever_the_model_is(tmp_path, capsys):
    begun(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    model = write_tiny_bailing(tmp_path / "model")
    for more in ([f"model.path={model}"], ["experiment=ring_lite_rl_stage1"]):
        assert main(["rl", "--check", *more, f"run.dir={tmp_path / 'run'}"]) == 2
        assert "holds an earlier run" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["rl", "sft"])
def test_a_valid_configuration_is_called_so_in_the_last_line_with_what_was_looked_at(command, tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    here = [f"model.path={model}", f"run.dir={tmp_path / 'run'}", "data.source=chains"]
    assert main([command, "--check", *here]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("valid: ") and "model, data and rewards" in last
    far = [f"model.path={tmp_path / 'far'}", "model.architecture=ling_lite", "data.path=far.jsonl"]
    assert main([command, "--check", *far, f"run.dir={tmp_path / 'run'}"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("valid: ") and f"model.path={tmp_path / 'far'} is not here, so no data" in last


@pytest.mark.parametrize(("overrides", "said"), [
    (["data.path=nowhere.jsonl"], "data.path=nowhere.jsonl is not a file"),
    (["data.source=chains", "data.size=20"], "sft.examples=4000, but data has 20 examples: set sft.examples=20"),
    (["observe.loggers=[no_such_module.Logger]"], "observe.loggers=no_such_module.Logger: cannot import"),
])
def test_supervised_examples_are_looked_at_before_ranks_start(overrides, said, tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    assert main(["sft", f"model.path={model}", f"run.dir={tmp_path / 'run'}", *overrides]) == 2
    assert said in capsys.readouterr().err


FUNCTIONS = {
    "rollout.environment": "{}", "observe.metrics": "[{}]", "observe.rollouts": "[{}]", "observe.loggers": "[{}]",
    "eval.functions": "[{}]", "algo.hooks.advantage": "{}", "algo.hooks.surrogate": "{}",
    "algo.hooks.denominator": "{}", "algo.hooks.group_filter": "{}", "reward.shaping": "[{{term: {}}}]",
    "reward.routes.math": "{}", "data.path": "{}",
}
"""Every key that names a function of the user's, and how a value of it is written; rollout.agent has tests of its
own."""


@pytest.mark.parametrize(("path", "said"), [
    ("no_such_module.step", "cannot import no_such_module"), ("os.no_step", "module os has no no_step"),
    ("os.sep", "is not a function"), ("tests.broken_module.step", "cannot import tests.broken_module (NameError: ")])
@pytest.mark.parametrize("key", FUNCTIONS)
@pytest.mark.parametrize("options", [["--check"], []])
def test_a_function_that_is_not_there_is_named_before_an_engine_starts(key, path, said, options, tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    data = ["data.source=function"] if key == "data.path" else ["experiment=quickstart"]
    assert main(["rl", *options, *data, f"model.path={model}", f"run.dir={tmp_path / 'run'}",
                 f"{key}={FUNCTIONS[key].format(path)}"]) == 2
    assert f"{key}={path}" in (error := capsys.readouterr().err) and said in error


def test_a_path_without_a_module_is_told_how_a_function_is_named(tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    for key in FUNCTIONS.keys() - {"reward.routes.math"}:  # a name without a dot is a scorer of the project's there
        data = ["data.source=function"] if key == "data.path" else ["experiment=quickstart"]
        assert main(["rl", "--check", *data, f"model.path={model}", f"run.dir={tmp_path / 'run'}",
                     f"{key}={FUNCTIONS[key].format('step')}"]) == 2
        assert f"{key}=step must be package.module.function" in capsys.readouterr().err


def test_a_generated_prompt_that_has_no_room_is_named_before_an_engine_starts(tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    assert main(["rl", f"model.path={model}", f"run.dir={tmp_path / 'run'}", "data.source=chains",
                 "rollout.max_response_tokens=63", "rollout.max_context_tokens=64"]) == 2
    assert "data.source=chains: chains-all-7-0: 16 tokens, longer than 1" in capsys.readouterr().err


def begun(run_dir: Path, *overrides: str) -> None:
    """What a run leaves that was killed before its first checkpoint."""
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(to_dict(load([f"run.dir={run_dir}", *overrides]))))


def test_a_resumed_run_without_a_checkpoint_says_so(tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    same = [f"model.path={model}", "data.path=none"]
    begun(tmp_path / "run", *same)
    assert main(["rl", *same, f"run.dir={tmp_path / 'run'}", "resume=true"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds no checkpoint yet: the run begins at its start" in said and "data.path=none" in said


def test_a_mistyped_folder_is_not_resumed(tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    words = ["rl", f"model.path={model}", f"run.dir={tmp_path / 'rnu'}", "data.path=none"]
    assert main([*words, "resume=true"]) == 2
    assert "rnu holds no run: correct run.dir, or begin one with resume=auto" in capsys.readouterr().err
    assert main([*words, "resume=auto"]) == 2  # on to the next thing that is wrong
    assert "holds no run" not in (err := capsys.readouterr().err) and "data.path=none" in err
    assert not (tmp_path / "rnu").exists()


@pytest.mark.parametrize(("overrides", "said"), [
    (["algo.phi=2048"], "algo.phi was 4096 and is 2048"),
    (["algo.objective=grpo"], 'algo.objective was "c3po" and is "grpo"'),
    (["data.shuffle=false", "reward.routes.math=exact"],
     'data.shuffle was true and is false; reward.routes.math was "math_verify"'),
    (["optimizer.lr=1e-4"], "optimizer.lr was 3e-06 and is 0.0001"),
    (["run.steps=90", "optimizer.schedule=cosine"], 'optimizer.schedule was "constant" and is "cosine"'),
    (["rollout.engine.dtype=bfloat16"], 'rollout.engine.dtype was null and is "bfloat16"')])
def test_a_resume_that_changes_what_is_learned_is_refused_before_anything_is_written(overrides, said, tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    run_dir = tmp_path / "run"
    same = [f"model.path={model}", f"run.dir={run_dir}", "data.path=none"]
    begun(run_dir, *same)
    before = (run_dir / "config.json").read_bytes()
    assert main(["rl", *same, "resume=true", *overrides]) == 2
    err = capsys.readouterr().err
    assert said in err and "or set run.accept_changes=true" in err, err
    assert [path.name for path in run_dir.iterdir()] == ["config.json"]
    assert (run_dir / "config.json").read_bytes() == before
    assert main(["rl", *same, "resume=true", *overrides, "run.accept_changes=true"]) == 2
    err = capsys.readouterr().err  # said all the same, and then goes on to what else is wrong
    assert "the run goes on with another" in err and "data.path=none" in err and "accept_changes" not in err


def test_a_job_is_looked_at_like_a_run_before_it_is_submitted(tmp_path, monkeypatch, capsys):
    """Its checkpoint too: in the queue a mistake would cost hours."""
    monkeypatch.setattr(slurm, "submit", lambda *_, **__: pytest.fail("the job was submitted"))
    model, run_dir = write_tiny_bailing(tmp_path / "model"), tmp_path / "run"
    begun(run_dir, same := f"model.path={model}")
    (run_dir / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert main(["slurm", "experiment=quickstart", same, f"run.dir={run_dir}", "resume=true",
                 "run.accept_changes=true"]) == 2
    assert "step_00000002" in capsys.readouterr().err


def test_a_folder_that_is_a_file_is_named_by_its_key(tmp_path, capsys):
    model, file = write_tiny_bailing(tmp_path / "model"), tmp_path / "file"
    file.write_text('{"prompt": "1+1", "answer": "2"}\n')
    assert main(["rl", f"model.path={model}", f"run.dir={file}"]) == 2
    assert main(["data", "clean", f"data.path={file}", "--out", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"run.dir={file} is a file" in said and f"--out {file} is a file" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said without a GPU")
def test_what_needs_a_gpu_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="model.kernels.router=triton needs a GPU"):
        check_devices(load(["model.kernels.router=triton"]))


def test_ranks_need_a_gpu_each_and_engines_beside_them_one_of_their_own(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="parallel.world_size=4 ranks need a GPU each, and this machine has 2"):
        check_devices(load(["parallel.world_size=4"]))
    check_devices(two := load(["parallel=dp2"]))
    warn_of_shared_gpus(two)
    assert "set rollout.engine.first_gpu=2" in capsys.readouterr().err
    for apart in ("rollout.engine.first_gpu=2", "rollout.engine.colocate=true"):
        warn_of_shared_gpus(load(["parallel=dp2", apart]))
    assert capsys.readouterr().err == ""


def test_a_job_whose_engines_share_the_ranks_gpus_says_so(capsys):
    job = ["parallel.world_size=16", "slurm.nodes=2", "slurm.gpus_per_node=8"]
    warn_of_shared_gpus(load(job), slurm=True)
    assert "set rollout.engine.first_gpu=8 or slurm.engine_nodes for GPUs of its own" in capsys.readouterr().err
    warn_of_shared_gpus(load([*job, "slurm.engine_nodes=1"]), slurm=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("overrides", "seen"), [
    (["data.path=mine.jsonl"], True), (["data.path=mine.jsonl", "data.split=train"], False),
    (["data.path=mine.jsonl", "eval.data={path: others.jsonl}"], False),
    (["experiment=quickstart"], False), (["experiment=domains"], False),
    (["data.source=mix", "data.mix={a: {path: a.jsonl, split: train}, b: {path: b.jsonl}}"], True)])
def test_held_out_problems_that_are_trained_on_are_pointed_out(overrides, seen, capsys):
    warn_of_seen_problems(load(overrides))
    assert ("held-out problems are among those that are trained on" in capsys.readouterr().err) == seen


@pytest.mark.parametrize(("teacher", "overrides", "said"), [
    ("nowhere", [], "algo.distillation.teachers.a.checkpoint=nowhere: no config.json there"),
    ("cut", [], "algo.distillation.teachers.a.checkpoint"), ("other", [], "has another vocabulary (hash "),
    ("same", ["algo.distillation.task_reward=false", "algo.distillation.routes={code: a}"],
     "task_reward=false, but domain math has no teacher"),
    ("same", ["algo.distillation.routes={maht: a}"],
     "algo.distillation.routes.maht: no prompt of `data` has that domain, they have math"),
    ("narrow", [], "checkpoint=NARROW has 96 rows in its head (vocab_size), and model.path has 100"),
    ("wide", ["algo.distillation.top_k=2"], "checkpoint=WIDE has 128 rows in its head"),
    ("wide", [], None),
    ("same", [], None)])
def test_a_teacher_that_cannot_teach_is_named_before_anything_starts(teacher, overrides, said, tmp_path, capsys):
    folders = {"nowhere": "nowhere"}
    for seed, name in enumerate(("student", "same", "cut", "narrow", "wide")):
        make_random_model(tmp_path / name / "model", seed,
                          **({"vocab_size": {"wide": 128, "narrow": 96}.get(name, 100)}))
        folders[name] = str(tmp_path / name / "model")
    (tmp_path / "cut" / "model" / "model.safetensors").unlink()
    folders["other"] = str(write_tiny_bailing(tmp_path / "other", vocab_size=96))
    code = main(["rl", "--check", "experiment=quickstart", f"model.path={folders['student']}",
                 f"run.dir={tmp_path / 'run'}", *overrides,
                 f"algo.distillation.teachers={{a: {{checkpoint: {folders[teacher]}}}}}"])
    said = said and said.replace(teacher.upper(), folders[teacher])
    assert (code, said in capsys.readouterr().err if said else True) == (2 if said else 0, True)
