"""Which keys a continuation may change: every key of the schema is decided one way or the other."""

import pytest

from megatron_rl.config.load import known_keys, load
from megatron_rl.config.resume import FREE, NOT_FREE, PASSING, changed, changes_experiment


def names(rows) -> list[str]:
    return [row[0] for row in rows]


@pytest.mark.parametrize("override", [
    "parallel=tp2", "batch.tokens_per_microbatch=4096", "model.recompute=full", "rollout.publish=disk",
    "rollout.engine.count=2", "rollout.concurrency=7", "observe.wandb=off", "run.save_every_steps=3", "eval.problems=5",
    "slurm.nodes=2", "reward.workers=5", "model.kernels.logprob=reference", "model.backend=torch",
    "run.steps=90"])
def test_how_a_run_is_done_may_change_and_is_said(override):
    before, now = load(["run.steps=60"]), load(["run.steps=60", override])
    assert len(changed(before, now)) >= 1
    assert changes_experiment(before, now) == []


@pytest.mark.parametrize("override", [
    "data.shuffle=false", "algo.phi=1", "algo.loss.kl_coef=0.5", "algo=grpo", "data.path=other.jsonl",
    "optimizer.lr=1e-4",
    "rollout.temperature=0.5", "rollout.prompts_per_step=3", "rollout.collector=budgeted", "run.seed=3",
    "model.dtype=bfloat16", "model.path=elsewhere", "reward.routes.other=exact", "reward.code.time_s=9",
    "rollout.engine.deterministic=true", "sft.batch_size=3"])
def test_what_a_run_learns_may_not(override):
    extra = ["algo.order=groups"] if "budgeted" in override else []
    before, now = load(extra), load([*extra, override])
    assert len(changes_experiment(before, now)) >= 1


def test_a_longer_run_is_another_one_if_the_learning_rate_looks_at_its_end():
    for schedule in (["optimizer.schedule=cosine"], ["optimizer.warmup_fraction=0.1"]):
        assert names(changes_experiment(load(schedule), load([*schedule, "run.steps=90"]))) == ["run.steps"]
        fixed = [*schedule, "sft.schedule_epochs=9"]
        assert changes_experiment(load(fixed), load([*fixed, "sft.epochs=5"])) == []
        assert names(changes_experiment(load(schedule), load([*schedule, "sft.epochs=5"]))) == ["sft.epochs"]


def test_a_budget_of_each_rank_is_another_one_in_another_layout():
    before, now = (load(["algo.scope=per_dp_rank", f"parallel={layout}"]) for layout in ("single", "dp2"))
    assert changes_experiment(before, now) == [("algo.phi over the cluster", 4096, 8192)]
    assert changes_experiment(load(["parallel=single"]), load(["parallel=dp2"])) == []


def test_a_teachers_servers_may_have_moved_but_the_teacher_may_not_change():
    def at(teacher, *more):
        return load([f"algo.distillation.teachers={{a: {teacher}}}", *more])

    one, other = "{urls: [http://one]}", "{urls: [http://two], api_key_env: KEY}"
    assert changed(at(one), at(other)) == []
    assert names(changes_experiment(at("{checkpoint: x}"), at("{checkpoint: y}"))) == [
        "algo.distillation.teachers.a.checkpoint"]
    assert names(changes_experiment(at(one), at(one, "algo.distillation.coef=2"))) == ["algo.distillation.coef"]


@pytest.mark.parametrize("server", ["judge", "remote"])
def test_a_server_that_judges_may_have_moved_and_be_waited_for_longer(server):
    before, now = load([f"reward.{server}.url=http://one"]), load([f"reward.{server}.url=http://two"])
    assert changed(before, now) == []
    patient = load([f"reward.{server}.url=http://one", f"reward.{server}.timeout_s=90", f"reward.{server}.retries=9"])
    assert len(changed(before, patient)) == 2 and changes_experiment(before, patient) == []
    assert names(changes_experiment(load([]), load(["reward.judge.model=other"]))) == ["reward.judge.model"]


@pytest.mark.parametrize("key", ["data.path={}", "reward.judge.rubric={}",
                                 "algo.distillation.teachers={{a: {{checkpoint: {}}}}}"])
def test_two_ways_to_write_one_file_are_no_change(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, now = load([key.format("a.jsonl")]), load([key.format(f"{tmp_path}/./a.jsonl")])
    assert changed(before, now) == []


def test_every_entry_of_the_lists_is_a_key_or_the_beginning_of_one():
    keys = [key for key, _ in known_keys()]
    for entry in (*PASSING, *FREE, *NOT_FREE):
        found = [key for key in keys if key.startswith(entry)]
        assert found and (entry.endswith(".") or entry in keys), entry
