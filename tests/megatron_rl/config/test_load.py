"""Composition is Hydra's; the schema is strict and says where the mistake is."""

import dataclasses

import pytest
import yaml

from megatron_rl.cli import main
from megatron_rl.config.load import CONF_DIR, build, load, to_dict
from megatron_rl.config.schema import Config


def test_defaults_live_in_the_schema():
    config = load([])
    assert config == build({"algo": {"objective": "c3po"}, "parallel": {"world_size": 1}})


def test_an_override_reaches_a_key_that_no_yaml_mentions():
    config = load(["experiment=quickstart", "rollout.engine.port=4321", "algo.loss.clip_eps_high=0.28"])
    assert config.rollout.engine.port == 4321
    assert config.algo.loss.clip_eps_high == 0.28
    assert config.algo.loss.clip_eps_low == 0.2  # the default beside it stays
    assert config.algo.phi == 4096  # from the experiment


def test_a_line_break_in_the_shells_quotes_arrives_and_latex_is_left_alone():
    config = load(['data.prompt_suffix="\nA: $\\nabla$"', 'rollout.stop=["\n"]'])
    assert config.data.prompt_suffix == "\nA: $\\nabla$" and config.rollout.stop == ("\n",)


def test_groups_are_chosen_by_name():
    config = load(["parallel=tp2_ep2", "algo=grpo"])
    assert (config.parallel.world_size, config.parallel.tp, config.parallel.ep) == (4, 2, 2)
    assert config.algo.objective == "grpo"


@pytest.mark.parametrize(("written", "name"), [
    *((name, name) for name in (
        "/tmp/l\u00e4ufe", "runs/\u6570 1", "a=b", "a,b", "(a)", "{a}", "[a]", "it's", 'say "so"', "a: b", "~/x", "C#",
        "x y ", "plain", "1", "true")),
    ("'quoted \u00e4'", "quoted \u00e4"), ('"quoted, too"', "quoted, too")])
def test_a_folder_may_have_any_name(written, name):
    assert load([f"run.dir={written}"]).run.dir == name
    assert load([f"model.path={written}"]).model.path == name
    assert load([f"select.folder={written}"]).select.folder == name
    assert load([f"data.path={written}"]).data.path == name and load(["data.path=null"]).data.path is None


def test_resume_needs_no_section():
    assert load(["resume=true"]).run.resume is True


def test_a_config_survives_json():
    config = load(["experiment=smollm2"])
    assert build(to_dict(config)) == config
    assert config.rollout.stop == ("\n",)


@pytest.mark.parametrize("overrides, message", [
    (["algo.phii=3"], r"unknown key algo\.phii \(did you mean algo\.phi\?\)"),
    (["rolout.temperature=1.0"], r"unknown key rolout \(did you mean rollout\?\)"),
    (["algo.loss.kl_coeff=0.1"], r"unknown key algo\.loss\.kl_coeff \(did you mean algo\.loss\.kl_coef\?\)"),
    (["algo.phi=many"], r"algo\.phi='many' must be int, not str"),
    (["algo.phi=1.5"], r"algo\.phi=1\.5 must be int, not float"),
    (["run.resume=1"], r"run\.resume=1 must be one of false, true, auto"),
    (["algo.cutoff=tokens"], r"algo\.cutoff=tokens must be one of token, response \(did you mean token\?\)"),
    (["algo.loss.surrogate=gpso"], r"algo\.loss\.surrogate=gpso must be one of ppo, gspo, lpo, cispo \(did you mean g"),
    (["algo.sequence_ratio_low=0.5"], r"algo\.sequence_ratio_low=0\.5 and algo\.sequence_ratio_high=None: set both"),
    (["algo.sequence_ratio_low=2.0", "algo.sequence_ratio_high=1.0"], r"algo\.sequence_ratio_low=2\.0 must be"),
    (["algo.sequence_min_token_ratio=1.5"], r"algo\.sequence_min_token_ratio=1\.5 must lie in \(0, 1\)"),
    (["algo.kpop_max_kl=0.0"], r"algo\.kpop_max_kl=0\.0 must be positive"),
    (["algo.tis_cap=-1.0"], r"algo\.tis_cap=-1\.0 must be positive"),
    (["algo.phi=0"], r"algo\.phi=0 must be at least 1 token"),
    (["algo.loss.clip_eps_low=-1.0"], r"algo\.loss\.clip_eps_low=-1\.0"),
    (["c3po.phi=4096"], r"c3po is called algo now: write algo for c3po in every key, file and command"),
    (["phi=4096"], r"unknown key phi \(did you mean algo\.phi\?\)"),
    (["kl_coef=0.1"], r"unknown key kl_coef \(did you mean algo\.loss\.kl_coef\?\)"),
    (["batch.sequence_length=1"], r"section batch has tokens_per_microbatch, logprob_chunk_tokens"),
    (["data=problems.jsonl"], r"data must be a section, not 'problems\.jsonl'; set its keys, such as data\.source="),
    (["rollout.stop=[a"], r"cannot read 'rollout\.stop=\[a': text with commas"),
    (["data.prompt_suffix=Answer: x, y"], r"cannot read 'data\.prompt_suffix=Answer: x, y': text with commas"),
    (['data.prompt_suffix="\\nA:"'], r"data\.prompt_suffix='.*' holds a backslash and an n, not a line break"),
    (['rollout.stop=["\\n"]'], r"rollout\.stop='.*' holds a backslash and an n, not a line break"),
    (["/"], r"override '/' must look like section\.key=value; for a checkpoint's folder write model\.path=/"),
    (["optimizer.beta2=1.0"], r"optimizer\.beta2=1\.0 must lie in \[0, 1\)"),
    (["optimizer.warmup_fraction=2.0"], r"optimizer\.warmup_fraction=2\.0 must lie in \[0, 1\]"),
    (["eval.top_p=0.0"], r"eval\.top_p=0\.0 must lie in"),
    (["eval.temperature=-1.0"], r"eval\.temperature=-1\.0 must not be negative"),
    (["rollout.engine.port=70000"], r"rollout\.engine\.port=70000 must lie in 1 to 65535"),
    (["rollout.engine.urls=[localhost:30000]"], r"rollout\.engine\.urls: 'localhost:30000' must look like http://"),
    (["experiment=quickstrt"], r"experiment=quickstrt: no such choice \(did you mean quickstart\?\)"),
    (["parallel.tp=3", "parallel.world_size=4"], r"parallel\.tp\*pp\*cp=3 does not divide parallel\.world_size=4"),
    (["parallel.tp=2", "parallel.world_size=2", "parallel.sequence_parallel=false"],
     r"parallel\.sequence_parallel=false"),
    (["parallel.sequence_parallel=true"], r"parallel\.sequence_parallel=true needs parallel\.tp > 1"),
    (["parallel.world_size=2", "parallel.pp=2", "parallel.vpp=1"], r"parallel\.vpp=1 must be at least 2"),
    (["optimizer.lr=0.0"], r"optimizer\.lr=0\.0 must be positive"),
    (["optimizer.beta2=1.0"], r"optimizer\.beta2=1\.0 must lie in \[0, 1\)"),
    (["optimizer.eps=0.0"], r"optimizer\.eps=0\.0 must be positive"),
    (["optimizer.weight_decay=-0.1"], r"optimizer\.weight_decay=-0\.1 must not be negative"),
    (["optimizer.clip_grad=-1.0"], r"optimizer\.clip_grad=-1\.0 must not be negative"),
    (["optimizer.min_lr_ratio=1.5"], r"optimizer\.min_lr_ratio=1\.5 must lie in \[0, 1\]"),
    (["optimizer.warmup_fraction=1.5"], r"optimizer\.warmup_fraction=1\.5 must lie in \[0, 1\]"),
    (["sft.balance_coef=-1.0"], r"sft\.balance_coef=-1\.0 must not be negative"),
    (["select.rule=pass_at_k", "select.samples=1"], r"select\.rule=pass_at_k with select\.samples=1 chooses"),
    (["observe.loggers=[tensorboard,tensorboard]"], r"observe\.loggers names a logger twice"),
    (["algo.phi"], r"must look like section\.key=value"),
    (["reward.routes={7: math_verify}"], r"reward\.routes has a key that YAML reads as 7"),
])
def test_a_mistake_is_named_with_its_path(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(overrides)


@pytest.mark.parametrize(("text", "named"), [
    ("on: 1", "the configuration has a key that YAML reads as True"),
    ("algo: {distillation: {off: 1}}", "algo.distillation has a key that YAML reads as False"),
    ("algo: {1: 2}", "algo has a key that YAML reads as 1"),
    ("data: {1.5: 2}", "data has a key that YAML reads as 1.5"),
    ("data: {null: 2}", "data has a key that YAML reads as None"),
    ("reward: {routes: {yes: math_verify}}", "reward.routes has a key that YAML reads as True"),
    ("pipeline: {stages: {no: {}}}", "pipeline.stages has a key that YAML reads as False"),
    ("data: {task_config: {levels: {2: 3}}}", "data.task_config.levels has a key that YAML reads as 2"),
    ("reward: {shaping: [{on: 1}]}", r"reward.shaping\[0\] has a key that YAML reads as True"),
])
def test_a_key_that_yaml_does_not_read_as_text_is_named(text, named):
    with pytest.raises(ValueError, match=f"^{named}, not as text: put it in quotes"):
        build(yaml.safe_load(text))


@pytest.mark.parametrize("group", ["experiment", "parallel", "algo"])
def test_every_yaml_file_builds_and_but_for_none_changes_something(group):
    names = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    assert len(names) > 5
    same = [name for name in names if load([f"{group}={name}"]) == Config()]
    assert same == {"experiment": ["none"], "parallel": ["single"], "algo": ["c3po"]}[group]


def test_schema_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load([]).algo.phi = 3


def test_the_configuration_page_is_written_from_the_schema():
    from megatron_rl.config.reference import markdown

    page = (CONF_DIR.parent / "docs" / "configuration.md").read_text()
    assert page == markdown(), "run: python -m megatron_rl.config.reference > docs/configuration.md"


def test_every_key_has_sentences_of_its_own():
    from megatron_rl.config.reference import keys

    assert len(keys()) > 200
    assert [name for name, key in keys().items() if not key.meaning.rstrip().endswith(".")] == []


@pytest.mark.parametrize(("name", "said"), [
    ("algo.phi", "algo.phi: int, default 4096"), ("eval.benchmarks.<name>.samples", "Responses to each problem"),
    ("algo.loss", "algo.loss.clip_eps_low")])
def test_a_key_or_a_section_is_explained(name, said, capsys):
    assert main(["config", "explain", name]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("name", "said"), [("algo.fi", "did you mean"), ("phi", "did you mean algo.phi?"),
                                            ("nothing.like.it", "is no key of the configuration")])
def test_an_unknown_key_is_not_explained(name, said, capsys):
    assert main(["config", "explain", name]) == 2
    assert said in capsys.readouterr().err
