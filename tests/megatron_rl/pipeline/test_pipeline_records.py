"""The bookkeeping of a pipeline: what is finished, what goes on, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os

import pytest
from rich.console import Console

from megatron_rl.pipeline import driver
from megatron_rl.pipeline.draw import draw_accuracies
from megatron_rl.pipeline.plan import Plan, plan
from megatron_rl.pipeline.record import FILE, Record, begin, finish, made_from, read, records, unfinished
from megatron_rl.pipeline.report import _stages, _summary, gain, result

SETS = {"math": {"accuracy": 0.5, "low": 0.4, "high": 0.6}}


@pytest.fixture(scope="module")
def composed() -> Plan:
    return plan(["experiment=ring_lite_tiny"])


@pytest.fixture
def todo(composed, tmp_path) -> Plan:
    """The plan in a folder of its own."""
    stages = [dataclasses.replace(stage, config=with_key(stage.config, "run", "dir", str(tmp_path / stage.name)))
              for stage in composed.stages]
    return Plan(with_key(composed.whole, "run", "dir", str(tmp_path)), tuple(stages))


def with_key(config, section, key, value):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})


def changed(todo: Plan, place: int, section: str, key: str, value: object) -> Plan:
    stages = list(todo.stages)
    stages[place] = dataclasses.replace(stages[place], config=with_key(stages[place].config, section, key, value))
    return Plan(todo.whole, tuple(stages))


def finished(todo: Plan, count: int) -> list[Record]:
    """The first `count` stages, run one after the other."""
    made: list[Record] = []
    for stage in todo.stages[:count]:
        made.append(finish(stage, begin(stage, made[-1].id if made else None, None), SETS, {"train": 1.0}))
    return made


def test_stages_come_in_order_and_a_finished_one_does_not_come_again(todo):
    for count in range(len(todo.stages)):
        assert unfinished(records(todo))[0] == count
        stage, found = todo.stages[count], records(todo)
        record = begin(stage, found[count - 1].id if count else None, None)
        assert unfinished(records(todo))[0] == count, "begun is not finished"
        finish(stage, record, SETS, {})
    assert not unfinished(records(todo))


def test_a_stage_that_was_stopped_is_the_same_one_when_it_begins_again(todo):
    (base,) = finished(todo, 1)
    first = begin(todo.stages[1], base.id, None)
    again = begin(todo.stages[1], base.id, read(todo.stages[1]))
    assert (again.id, again.starts, again.after) == (first.id, 2, base.id)
    assert finish(todo.stages[1], again, SETS, {}) == read(todo.stages[1])


def test_a_changed_configuration_is_refused_with_the_key_and_the_way_out(todo):
    finished(todo, 5)
    with pytest.raises(ValueError, match=r"stage math_rl is finished with another configuration: math_rl\.run\.steps=9 "
                       r"\(was 60\).*remove \S+/math_rl \S+/code_science_rl to run again from there"):
        records(changed(todo, 3, "run", "steps", 9))
    with pytest.raises(ValueError, match=r"stage base .*: eval\.seed=1 \(was 99\)"):
        records(changed(todo, 0, "eval", "seed", 1))


def test_servers_and_paths_may_be_written_in_another_way_at_a_later_start(tmp_path, monkeypatch):
    """As for a run that goes on: a judge or a teacher on another port changes nothing that a stage learns."""
    monkeypatch.chdir(tmp_path)

    def at(port: int, root: str) -> Plan:
        return plan(["experiment=ring_lite_tiny", f"run.dir={root}", f"reward.judge.url=http://x:{port}/v1",
                     f"math_rl.reward.judge.url=http://x:{port}/v1", "math_rl.algo.distillation.routes={math: t}",
                     f"math_rl.algo.distillation.teachers={{t: {{urls: ['http://x:{port}']}}}}"])

    finished(at(1, "here"), 4)
    assert unfinished(records(at(2, str(tmp_path / "here")))) == [4, 5]


def test_a_begun_stage_holds_its_configuration_too(todo):
    begin(todo.stages[1], finished(todo, 1)[0].id, None)
    with pytest.raises(ValueError, match=r"stage long_cot_sft has begun .* long_cot_sft\.sft\.epochs=2 \(was 6\)"):
        records(changed(todo, 1, "sft", "epochs", 2))


def test_what_changes_no_result_may_change(todo):
    finished(todo, 6)
    engine = dataclasses.replace(todo.whole.rollout.engine, urls=("http://127.0.0.1:1",), threads=2)
    for section, key, value in (("rollout", "engine", engine), ("run", "resume", True)):
        assert not unfinished(records(changed(todo, 3, section, key, value)))
    observe = dataclasses.replace(todo.whole.observe, progress=False)
    stages = [dataclasses.replace(stage, config=dataclasses.replace(stage.config, observe=observe))
              for stage in todo.stages]
    assert not unfinished(records(Plan(todo.whole, tuple(stages))))


def test_a_choice_holds_while_only_the_training_after_it_changes(todo):
    begin(todo.stages[3], finished(todo, 3)[-1].id, None)
    with pytest.raises(ValueError, match=r"stage math_rl has begun .* math_rl\.run\.steps=9"):
        records(changed(changed(todo, 2, "run", "steps", 9), 3, "run", "steps", 9))
    with pytest.raises(ValueError, match=r"stage choice .* choice\.data\.seed=1"):
        records(changed(todo, 2, "data", "seed", 1))


def test_a_stage_made_anew_makes_those_after_it_stale(todo):
    made = finished(todo, 4)
    sft = todo.stages[1]
    finish(sft, begin(sft, made[0].id, None), SETS, {})  # its folder was removed and it ran again
    with pytest.raises(ValueError, match=r"choice was made from an earlier result of stage long_cot_sft: remove "
                       r"\S+/choice \S+/math_rl"):
        records(todo)
    (sft.folder / FILE).unlink()
    with pytest.raises(ValueError, match="earlier result of stage long_cot_sft"):
        records(todo)


def test_a_specialist_made_anew_makes_stale_what_it_taught_and_nothing_beside_it(tmp_path):
    ring = plan(["experiment=ring_mini", f"run.dir={tmp_path}"])
    for stage in ring.stages:
        finish(stage, begin(stage, made_from(ring, stage, records_of(ring)), None), SETS, {})
    assert not unfinished(records(ring))
    code = ring.stages[4]
    finish(code, begin(code, made_from(ring, code, records_of(ring)), None), SETS, {})
    with pytest.raises(ValueError, match=rf"one_model was made from an earlier result of stage choice or math_rl or "
                       rf"code_rl or science_rl: remove {tmp_path}/one_model {tmp_path}/adaptive to run"):
        records(ring)


def test_a_finished_specialist_behind_one_that_is_missing_is_neither_run_again_nor_said_to_wait(tmp_path, monkeypatch):
    ring = plan(["experiment=ring_mini", f"run.dir={tmp_path}"])
    (tmp_path / "base" / "hf").mkdir(parents=True)
    (tmp_path / "base" / "hf" / "config.json").touch()
    for stage in ring.stages:
        finish(stage, begin(stage, made_from(ring, stage, records_of(ring)), None), SETS, {"train": 61.0})
    missing = ["code_rl", "one_model", "adaptive"]
    for name in missing:
        (tmp_path / name / FILE).unlink()
    made = [(stage, read(stage)) for stage in ring.stages if stage.name in ("base", "science_rl")]
    assert result(ring, made)["waiting"] == [
        stage.name for stage in ring.stages if stage.name not in ("base", "science_rl")]
    row = next(part for part in _stages(ring, made).split("<tr>") if "science_rl" in part)
    assert "<td>5</td>" in row and "1 min 01 s" in row, row

    ran: list[str] = []  # in place of what needs an engine and ranks
    for name, stand_in in (("check_start", lambda *_: None), ("check_memories", lambda *_: None),
                           ("write_result", lambda *_: tmp_path),
                           ("engines_for", lambda *_: contextlib.nullcontext(ring.whole)),
                           ("make_model", lambda stage, *_: ran.append(stage.name)),
                           ("evaluate_model", lambda *_: SETS)):
        monkeypatch.setattr(driver, name, stand_in)
    driver.run(ring, Console(quiet=True))
    assert ran == missing and not unfinished(records(ring))
    assert read(ring.stages[5]).seconds == {"train": 61.0}


def records_of(ring: Plan) -> list[Record | None]:
    return [read(stage) for stage in ring.stages]


def test_a_gain_is_of_the_same_problems_with_an_interval_of_their_differences(todo):
    before, after = todo.stages[:2]
    for stage, verdicts in ((before, {"a": [True, False], "b": [False, False], "c": [True, True]}),
                            (after, {"a": [True, True], "b": [False, True], "c": [True, True]})):
        (stage.folder / "evaluation").mkdir(parents=True)
        (stage.folder / "evaluation" / "evaluation_samples.jsonl").write_text("".join(
            json.dumps({"set": "math", "id": name, "correct": right, "status": "correct" if right else "wrong"}) + "\n"
            for name, found in verdicts.items() for right in found))
    found = gain(after, before, todo.whole.eval)
    mean, low, high = found["math"]
    assert mean == pytest.approx((0.5 + 0.5 + 0.0) / 3) and (low, high) == (0.0, 0.5)


@pytest.mark.parametrize("failing", ["before", "after"])
def test_a_problem_that_one_of_two_models_could_not_be_asked_is_left_out_of_the_gain(todo, failing):
    before, after = todo.stages[:2]
    for stage, name, right in ((before, "before", False), (after, "after", True)):
        (stage.folder / "evaluation").mkdir(parents=True)
        (stage.folder / "evaluation" / "evaluation_samples.jsonl").write_text("".join(json.dumps({
            "set": "math", "id": problem, "correct": right and status == "correct", "status": status}) + "\n"
            for problem, status in (("a", "correct" if right else "wrong"),
                                    ("b", "engine_error" if name == failing else "wrong"))))
    assert gain(after, before, todo.whole.eval)["math"] == (1.0, 1.0, 1.0)


def test_a_record_is_written_whole_or_not_at_all(todo, monkeypatch):
    (base,) = finished(todo, 1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        begin(todo.stages[0], None, base)
    assert read(todo.stages[0]) == base
    assert os.listdir(todo.stages[0].folder) != [FILE], "what was being written lies beside it"


def test_a_damaged_record_is_named(todo):
    finished(todo, 2)
    path = todo.stages[1].folder / FILE
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"long_cot_sft/stage\.json is no record of a stage.*remove \S+/long_cot_sft"):
        records(todo)


def test_the_report_sets_the_first_model_beside_the_last(todo):
    made = finished(todo, 2)
    last = dataclasses.replace(made[1], evaluation={"math": {"accuracy": 0.75}})
    shown = _summary(list(zip(todo.stages[:2], [made[0], last], strict=True)))
    assert "0.500 \u2192 0.750" in shown and "2 s" in shown


def test_a_set_whose_accuracy_some_models_lack_is_shown_where_it_is_known(todo):
    """Nobody may be able to say of one model's responses whether they are right."""
    known, graded = SETS, {"math": {"mean_reward": 0.5}}
    for evaluations in ([known, graded], [graded, known], [graded, graded], [known, {}]):
        made = [dataclasses.replace(record, evaluation=each)
                for record, each in zip(finished(todo, 2), evaluations, strict=True)]
        _summary(list(zip(todo.stages[:2], made, strict=True)))
        places = [line.steps.tolist() for line in draw_accuracies(evaluations).lines]
        assert places == [[float(place) for place in (0, 1) if evaluations[place] == known]] * (known in evaluations)
