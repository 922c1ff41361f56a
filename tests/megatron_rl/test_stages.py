"""Stages of an RL run: what each changes, which one a checkpoint is in, and when one is over."""

import json

import pytest

from megatron_rl.config.load import load
from megatron_rl.model import checkpoint_files as files
from megatron_rl.orchestrator.stages import current, plateaued, resumed, stage_configs, widest

STAGES = ("stages=[{name:math,steps:4,set:{algo.phi:100,rollout.max_context_tokens:120}},"
          "{name:mixed,steps:3,optimizer:reset,set:{optimizer.lr:1e-4,data.seed:8}}]")


@pytest.fixture
def config(tmp_path):
    return load(["experiment=quickstart", "run.steps=7", STAGES, f"run.dir={tmp_path}"])


def saved(config, tmp_path, step, stage):
    """As a checkpoint of that step leaves the run's folder, as far as stages are concerned."""
    folder = tmp_path / "checkpoints" / f"step_{step:08d}"
    partial = folder.with_suffix(".partial")
    partial.mkdir(parents=True)
    with files.writing(partial / "loop.json") as file:
        file.write(json.dumps({"step": step, **stage}).encode())
    files.commit(partial, folder, {"format": files.FORMAT, "files": {"loop.json": file.entry}}, keep=9)
    return resumed(config)


def test_a_damaged_stage_is_named_before_it_is_believed(config, tmp_path):
    config = saved(config, tmp_path, 2, current(config).state(over=False))
    path = tmp_path / "checkpoints" / "step_00000002" / "loop.json"
    path.write_text(path.read_text().replace('"over": false', '"over": true '))
    with pytest.raises(files.DamagedCheckpoint, match="loop.json has changed since it was written"):
        current(config)


def test_a_stage_changes_its_keys_and_nothing_else(config):
    first, second = stage_configs(config)
    assert (first.algo.phi, first.rollout.max_context_tokens, first.run.steps) == (100, 120, 4)
    assert (second.algo.phi, second.optimizer.lr, second.data.seed, second.run.steps) == (4096, 1e-4, 8, 7)
    assert (second.rollout, second.model, first.optimizer) == (config.rollout, config.model, config.optimizer)
    assert widest(config).rollout.max_context_tokens == 128


def test_a_checkpoint_says_which_stage_comes_next(config, tmp_path):
    start = current(config)
    assert (start.index, start.first_step, start.fresh, start.is_last) == (0, 0, True, False)
    config = saved(config, tmp_path, 2, start.state(over=False))
    middle = current(config)
    assert (middle.index, middle.first_step, middle.fresh) == (0, 0, False) and middle.keeps_order
    config = saved(config, tmp_path, 3, middle.state(over=True))  # a step before its time: a plateau
    second = current(config)
    assert (second.index, second.first_step, second.fresh, second.is_last) == (1, 3, True, True)
    assert second.config.run.steps == 6 and second.resets_optimizer and not second.keeps_order
    config = saved(config, tmp_path, 5, second.state(over=False))
    second_again = current(config)
    assert not second_again.resets_optimizer and second_again.keeps_order and second_again.config.run.steps == 6
    end = current(saved(config, tmp_path, 6, second.state(over=True)))
    assert end.done and end.is_last and end.config.run.steps == 6  # nothing is left but the export
    assert not second.done and not start.done


@pytest.mark.parametrize(("common", "change", "kept"), [
    ([], "algo.phi:100", True),
    (["rollout.pass_rate.enabled=true"], "rollout.pass_rate.floor:0.1", True),
    ([], "rollout.pass_rate.enabled:true", False),
    (["rollout.pass_rate.enabled=true"], "rollout.pass_rate.enabled:false", False),
    ([], "rollout.max_response_tokens:40", True),  # no row may be too long
    (["data={source:jsonl,path:x,on_error:skip}"], "algo.phi:100", True),
    (["data={source:jsonl,path:x,on_error:skip}"], "rollout.max_response_tokens:40", False),
    (["data={source:mix,mix:{a:{path:x,on_error:skip},b:{path:y}}}"], "rollout.max_context_tokens:120", False),
    (["data={source:jsonl,path:x,on_error:skip}"], "reward.routes:{math:exact}", False),
    ([], "rollout.collector:budgeted", False),
])
def test_a_stage_that_changes_what_the_collectors_state_belongs_to_begins_a_new_order(tmp_path, common, change, kept):
    """A sampler refuses the state of another kind or size, and a stage in the middle of a run would end it."""
    config = load(["experiment=quickstart", "run.steps=7", f"run.dir={tmp_path}", *common,
                   f"stages=[{{name:a,steps:4}},{{name:b,steps:3,set:{{{change}}}}}]"])
    config = saved(config, tmp_path, 4, current(config).state(over=True))
    second = current(config)
    assert (second.index, second.fresh, second.keeps_order) == (1, True, kept)


@pytest.mark.parametrize(("change", "kept"), [
    ("rollout.max_response_tokens:90", True), ("rollout.temperature:0.9", True),
    ("rollout.max_response_tokens:40", False),  # an open response may have more already
    ("rollout.responses_per_prompt:4", False),  # groups of a step must be of one size
    ("algo.distillation.teachers:{a:{urls:['http://x']}}", False),  # which was not asked about responses that wait
])
def test_responses_under_way_are_dropped_if_the_next_stage_cannot_go_on_with_them(tmp_path, change, kept):
    config = load(["experiment=quickstart", "run.steps=7", f"run.dir={tmp_path}", "rollout.collector=partial",
                   f"stages=[{{name:a,steps:4}},{{name:b,steps:3,set:{{{change}}}}}]"])
    config = saved(config, tmp_path, 4, current(config).state(over=True))
    second, state = current(config), {"prompts": {"draws": 3}, "open": ["a group"]}
    assert second.keeps_order and second.carried(state) == {**state, "open": ["a group"] if kept else []}
    assert second.carried({"prompts": {}}) == {"prompts": {}}  # of another collector


def test_a_checkpoint_of_other_stages_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="saved in stage 0 .of a run without.*stages are math, mixed"):
        current(saved(config, tmp_path, 2, {}))
    with pytest.raises(ValueError, match=r"saved in stage 1 .other."):
        current(saved(config, tmp_path, 3, {"stage": {"name": "other", "index": 1, "first_step": 2, "over": False}}))


def test_the_learning_rate_schedule_spans_the_stages_that_share_it(tmp_path):
    """5 steps of 2 updates each and 3 of 1, then begun anew 2 of 1: 13 optimiser steps and 2."""
    config = load(["experiment=quickstart", "run.steps=10", f"run.dir={tmp_path}",
                   "stages=[{name:a,steps:5,set:{algo.updates_per_rollout:2}},{name:b,steps:3},"
                   "{name:c,steps:2,optimizer:reset}]"])
    spans = []
    for step in (5, 8, 10):
        stage = current(config)
        spans.append(stage.schedule_updates)
        config = saved(config, tmp_path, step, stage.state(over=True))
    assert spans == [13, 13, 2]


def test_without_stages_a_run_is_one(tmp_path):
    config = load(["experiment=quickstart", f"run.dir={tmp_path}"])
    stage = current(config)
    assert stage.schedule_updates == config.run.steps * config.algo.updates_per_rollout
    assert stage.config == config and stage.is_last and not stage.fresh and stage.state(over=True) == {}
    assert stage_configs(config) == [config]


@pytest.mark.parametrize(("stages", "message"), [
    ("[{name:a,steps:4}]", "run.steps=7 must be the sum of the stages' steps, 4"),
    ("[{steps:7}]", "every stage needs a name"),
    ("[{name:a,steps:4},{name:a,steps:3}]", "two have the same name"),
    ("[{name:a,steps:7,set:{parallel.ep:2}}]", r"a: set.parallel.ep cannot change between stages"),
    ("[{name:a,steps:7,set:{rollout.engine.count:2}}]", r"set.rollout.engine.count cannot change"),
    ("[{name:a,steps:7,set:{algo.phy:2}}]", r"stages: a: unknown key algo.phy \(did you mean algo.phi"),
    ("[{name:a,steps:7,set:{algo.phi:0}}]", r"stages: a: algo.phi=0 must be at least 1"),
    ("[{name:a,steps:7,set:{algo.router_replay:rollout}}]", "a: algo.router_replay=rollout needs engines that were"),
    ("[{name:a,steps:7,set:{rollout.publish:adapter}}]", "a: rollout.publish=adapter needs engines that were started"),
    ("[{name:a,steps:7,set:{algo.phi.x:1}}]", r"stages: a: algo.phi.x: phi is no section"),
])
def test_a_wrong_stage_names_itself_and_its_key(stages, message):
    with pytest.raises(ValueError, match=message):
        stage_configs(load(["experiment=quickstart", "run.steps=7", f"stages={stages}"]))


def test_a_plateau_compares_two_windows():
    rewards = [0.1, 0.3, 0.4, 0.4, 0.45, 0.45]
    assert not plateaued(rewards[:3], 2, 0.1)  # fewer than two windows
    assert not plateaued(rewards[:4], 2, 0.1)  # 0.4 after 0.2
    assert plateaued(rewards, 2, 0.1)  # 0.45 after 0.4
    assert not plateaued(rewards, 2, 0.04) and not plateaued(rewards, 0, 1.0)
