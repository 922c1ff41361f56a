"""Ablations for two steps, a real trainer and engine, a tiny random model; interrupted and gone on with."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_rl.ablations import spec
from megatron_rl.cli import main
from megatron_rl.config.load import load
from megatron_rl.rollout.engines import EngineProcess

pytestmark = pytest.mark.slow

SHORT = [
    "parallel=single", "run.steps=2", "run.save_every_steps=1", "run.keep_checkpoints=2", "eval.every_steps=0",
    "eval.bootstrap_resamples=50", "rollout.prompts_per_step=4", "rollout.responses_per_prompt=2",
    "rollout.max_response_tokens=16", "rollout.max_context_tokens=96", "rollout.stop=[]", "algo.phi=64",
    "algo.dynamic_sampling=false", "algo.underfull=train_short", "reward.routes.math=tests.rewards.brevity",
    "reward.routes.arithmetic=tests.rewards.brevity", "observe.progress=false", "observe.wandb=off",
]


@pytest.fixture(scope="module")
def engine_url(quickstart_model, tmp_path_factory):
    config = load(["experiment=quickstart", *SHORT, f"model.path={quickstart_model}"])
    log = tmp_path_factory.mktemp("log") / "engine.log"
    with EngineProcess.from_config(config.rollout, quickstart_model, log_path=log) as engine:
        yield engine.base_url


@pytest.mark.parametrize("name", ["async_staleness", "table3_domain_conflict", "table4_two_stage", "upcycle_smollm2"])
def test_two_arms_run_to_a_result_and_an_interrupted_run_goes_on(name, quickstart_model, engine_url, tmp_path, capsys):
    """One of each kind: a collector, domains, stages, a converted model. tests/megatron_rl/ablations composes all."""
    arms = [list(spec.load_ablation(name).arms)[place] for place in (0, -1)]  # a statement compares them
    few = [f"eval.benchmarks.{domain}.problems=4" for domain in ("math", "code", "science")]
    few = few if "table" in name else ["eval.problems=4"]
    settings = ["seeds=0", f"arms={','.join(arms)}", f"out={tmp_path}", f"start={quickstart_model}", *SHORT, *few,
                f'rollout.engine.urls=["{engine_url}"]']
    assert main(["ablate", name, *settings]) == 0
    assert "cannot tell" in capsys.readouterr().out, "one seed proves nothing"
    folder = tmp_path / name / "tiny"
    first, second = (folder / arm / "seed_0" for arm in arms)
    result = json.loads((folder / "result.json").read_text())
    assert all(len(values) == 1 for values in result["values"][arms[0]].values())
    assert (folder / "figure.png").stat().st_size > 10_000

    if name != "upcycle_smollm2":
        return  # once is enough
    untouched = (first / "metrics.jsonl").read_bytes()
    log = (second / "eval.jsonl").read_text().splitlines(keepends=True)
    (second / "eval.jsonl").write_text("".join(log[:-1]))  # as if killed in its last step
    shutil.rmtree(second / "checkpoints" / "step_00000002")
    assert main(["ablate", name, *settings, "--collect"]) == 2, "nothing is whole"
    assert main(["ablate", name, *settings]) == 0
    assert (first / "metrics.jsonl").read_bytes() == untouched, "a finished run is not run again"
    assert json.loads((folder / "result.json").read_text())["seeds"] == [0]


def test_a_student_learns_from_a_prepared_teacher_and_another_from_its_responses(
        quickstart_model, engine_url, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    short = json.dumps([f"model.path={quickstart_model}", "experiment=quickstart", *SHORT, "eval.problems=4",
                        "eval.temperature=0", f"rollout.engine.urls=[{engine_url}]"])  # sampling is not seeded
    monkeypatch.setattr(spec, "EXAMPLES", tmp_path)
    (tmp_path / "mine" / "ablation.yaml").write_text(f"""
arms: {{taught: distilled, told: supervised}}
scales:
  tiny:
    common: {short}
    prepared:
      teacher: {{overrides: {short}}}
      responses:
        {{recipe: evaluate, start: teacher, overrides: {json.dumps([*json.loads(short)[1:], "eval.problems=32",
            "eval.data={source: chains, split: train, size: 32}"])}}}
    arms:
      taught: {{teachers: {{math: teacher}}, overrides: [algo.distillation.task_reward=false]}}
      told: {{recipe: sft, responses_of: responses, overrides: [sft.examples=32, sft.batch_size=16, sft.epochs=1]}}
columns:
  - {{label: before, metric: held_out/accuracy, take: first}}
  - {{label: tokens, metric: train/selected_tokens, take: sum}}
""")
    settings = [f"out={tmp_path / 'out'}"]
    assert main(["ablate", "mine", "--check", *settings]) == 0
    assert main(["ablate", "mine", *settings]) == 0
    folder = tmp_path / "out" / "mine" / "tiny"
    values = json.loads((folder / "result.json").read_text())["values"]
    assert values["taught"]["before"] == values["told"]["before"], "the same model, problems and seeds"
    samples = (folder / "starts" / "responses" / "evaluation_samples.jsonl").read_text().splitlines()
    assert len(samples) == 32 * 2, "two to each problem"
    assert values["taught"]["tokens"] == [2 * 64.0] and values["told"]["tokens"][0] > 32
    rows = [json.loads(line) for line in (folder / "told" / "seed_0" / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2]

    before = {path: path.read_bytes() for path in folder.rglob("eval*.json*")}
    shutil.rmtree(folder / "taught")
    (folder / "told" / "seed_0" / "eval.jsonl").write_text("")  # as if killed before the evaluation
    assert main(["ablate", "mine", *settings]) == 0
    after = {path: path.read_bytes() for path in before}
    kept = [path for path in before if path.parent.parent.name == "starts"]
    assert kept and all(before[path] == after[path] for path in kept), "what is prepared is not made again"


def test_arms_begin_from_a_supervised_start_that_is_trained_once(engine_url, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    start = "[experiment=quickstart_sft, parallel=single, sft.epochs=1, sft.examples=32, observe.progress=false]"
    (tmp_path / "mine" / "ablation.yaml").write_text(
        f"arms: {{a: A}}\nscales: {{tiny: {{common: [experiment=quickstart], starts: {{short: {start}}}, "
        "arms: {a: {start: short}}}}\ncolumns: [{label: reward, metric: reward/mean}]\n")
    monkeypatch.setattr(spec, "EXAMPLES", tmp_path)
    settings = [f"out={tmp_path / 'out'}", *SHORT, "run.steps=1", "eval.problems=4",
                f'rollout.engine.urls=["{engine_url}"]']
    assert main(["ablate", "mine", *settings]) == 0
    folder = tmp_path / "out" / "mine" / "tiny"
    config = json.loads((folder / "a" / "seed_0" / "config.json").read_text())
    assert config["model"]["path"] == str(folder / "starts" / "short" / "hf")
    trained = (folder / "starts" / "short" / "metrics.jsonl").read_bytes()
    assert len(trained.splitlines()) == 2, "32 examples, 16 a step"
    assert main(["ablate", "mine", *settings]) == 0
    assert (folder / "starts" / "short" / "metrics.jsonl").read_bytes() == trained
