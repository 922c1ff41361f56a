"""Before anything starts: every row is held against its scorer, the model's vocabulary and the room there is."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.config.data import DataConfig
from megatron_rl.config.load import load
from megatron_rl.config.reward import RewardConfig
from megatron_rl.data import Limits, build_prompts, build_source, chains_tokenizer
from megatron_rl.model.architectures import read_config
from megatron_rl.model.tokenizer import load_tokenizer
from megatron_rl.orchestrator.evaluation import HELD_OUT, number_evaluated
from megatron_rl.preflight import check_data, check_functions, check_sft_data
from megatron_rl.prompts import sft_source
from megatron_rl.reward import RewardPool
from tests.megatron_rl.data.shipped import rows, write_jsonl
from tests.tiny_models import write_tiny_bailing

CODE = {"prompt": "q", "language": "python", "mode": "stdin", "tests": [{"input": "1", "output": "2"}]}
GYM = {"task": "chain_sum", "task_config": {}, "entry": {"question": "1+1", "answer": "2", "metadata": {}}}
NEEDS = {
    "math_verify": ({"prompt": "q", "answer": "2"}, [{"answer": None}, {"answer": "  "}, {"answer": []}]),
    "exact": ({"prompt": "q", "answer": "2"}, [{"answer": None}, {"answer": ""}]),
    "science": ({"prompt": "q", "answer": "2 m"}, [{"answer": None}, {"tolerance": "1%"}, {"tolerance": -1},
                                                 {"tolerance": True}]),
    "code": (CODE, [{"mode": None}, {"mode": "call"}, {"tests": None}, {"tests": []}, {"tests": [{"input": "1"}]},
                    {"language": "cobol"}, {"mode": "function", "tests": [{"args": [1], "expected": 2}]},
                    {"tests": "[]"}, {"mode": "unit", "tests": "  ", "entry_point": "f"}]),
    "reasoning_gym": ({"prompt": "q", **GYM}, [{"entry": None}, {"task": None}, {"task_config": None}]),
}
"""Scorer -> a row with all it needs, and changes that take something away."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chains_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def build(path, tokenizer, scorer, **keys):
    config = RewardConfig(routes={"math": scorer}, sandbox="unsafe")
    with RewardPool(config) as rewards:
        return build_source(DataConfig(path=str(path), **keys), tokenizer, Limits(100, check=rewards.check))


@pytest.mark.parametrize("scorer", NEEDS)
def test_each_row_is_held_against_what_its_scorer_needs(scorer, tmp_path, tokenizer, caplog):
    good, changes = NEEDS[scorer]
    assert len(build(write_jsonl(tmp_path / "good.jsonl", [good] * 3), tokenizer, scorer)) == 3
    path = write_jsonl(tmp_path / "bad.jsonl", [good, *({**good, **change} for change in changes)])
    with pytest.raises(ValueError) as caught:
        build(path, tokenizer, scorer)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{len(changes)} bad line(s)")
    assert [f"{path}:{number}: " in line for number, line in enumerate(lines, start=2)] == [True] * len(changes), lines
    with caplog.at_level(logging.WARNING):
        assert len(build(path, tokenizer, scorer, on_error="skip")) == 1
    assert f"{len(changes)} bad line(s)" in caplog.text


def test_a_mistyped_answer_column_is_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "answr": "2"}])
    with pytest.raises(ValueError, match=r"a.jsonl:1: no reference answer.*did you mean data.answer_key=answr\?"):
        build(path, tokenizer, "math_verify")


def test_a_file_in_which_nothing_is_left_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q"}])
    with pytest.raises(ValueError, match="data.on_error=skip left out every problem"):
        build(path, tokenizer, "exact", on_error="skip")


def wide_tokenizer(folder):
    """Knows a token that its 96-token model does not."""
    tokenizer = chains_tokenizer(folder)
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


@pytest.mark.parametrize("source", ["prompt", "response", "prefix", "chat template", "end of text"])
def test_a_token_beyond_the_models_vocabulary_is_named(source, tmp_path):
    tokenizer = wide_tokenizer(tmp_path / "wide")
    row = {"prompt": "3+4", "answer": "7", "worked": "7"}
    keys, limits = {"response_key": "worked"}, Limits(vocabulary_size=96, max_example_tokens=50)
    if source == "prompt":
        row["prompt"] += "<extra>"
    elif source == "response":
        row["worked"] += "<extra>"
    elif source == "prefix":
        keys["prompt_prefix"] = "<extra>"
    elif source == "chat template":
        tokenizer.chat_template, keys["template"] = "{{ messages[0].content }}<extra>", "chat"
    else:
        tokenizer.eos_token = "<extra>"
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1+1", "answer": "2", "worked": "2"}] * 2 + [row])
    number = 1 if source in ("prefix", "chat template", "end of text") else 3
    with pytest.raises(ValueError, match=rf":{number}: its (prompt|response) holds token 96 \(<extra>\), but the model "
                                         "knows 96 tokens"):
        build_source(DataConfig(path=str(path), **keys), tokenizer, limits)
    rl = Limits(100, vocabulary_size=96)
    assert source in ("prompt", "prefix", "chat template") or len(build_source(DataConfig(path=str(path), **keys),
                                                                              tokenizer, rl)) == 3
    assert len(build_source(DataConfig(path=str(path), **keys), tokenizer, replace(limits, vocabulary_size=97))) == 3


def sft(tmp_path, given, *overrides):
    model = tmp_path / "model"
    if not model.exists():
        write_tiny_bailing(model)
    path = write_jsonl(tmp_path / "sft.jsonl", given)
    return load([f"model.path={model}", f"run.dir={tmp_path / 'run'}", f"data.path={path}", "data.response_key=worked",
                 "sft.examples=2", "sft.batch_size=1", *overrides])


GOOD = {"prompt": "3+4", "answer": "7", "worked": "7"}


@pytest.mark.parametrize(("bad", "said"), [
    ({**GOOD, "worked": "1+" * 200}, r"sft.jsonl:2: prompt and response have \d+ tokens, 64 fit"),
    ({**GOOD, "prompt": "1+" * 200}, r"sft.jsonl:2: prompt and response have \d+ tokens, 64 fit"),
    ({**GOOD, "worked": None}, "sft.jsonl:2: .*no response to train on"),
    ({"prompt": "3+4"}, "sft.jsonl:2: .*no response to train on")])
def test_every_example_is_looked_at_and_left_out_if_asked(bad, said, tmp_path):
    room = "batch.tokens_per_microbatch=64"
    with pytest.raises(ValueError, match=said):
        check_sft_data(sft(tmp_path, [GOOD, bad, GOOD], room))
    config = sft(tmp_path, [GOOD, bad, GOOD], room, "data.on_error=skip")
    source = sft_source(config, load_tokenizer(config.model))
    assert [source.sft_example(i)[0].id for i in range(len(source))] == ["sft.jsonl:1", "sft.jsonl:3"]
    with pytest.raises(ValueError, match="sft.examples=3, but data has 2 examples"):
        check_sft_data(sft(tmp_path, [GOOD, bad, GOOD], room, "data.on_error=skip", "sft.examples=3"))


def test_an_example_has_the_room_of_the_models_positions_too(tmp_path):
    config = sft(tmp_path, [GOOD, {**GOOD, "worked": "1+" * 4000}], "batch.tokens_per_microbatch=16384")
    most = read_config(config.model.path).max_position_embeddings
    assert most < 8000
    with pytest.raises(ValueError, match=rf"sft.jsonl:2: prompt and response have 800\d tokens, {most} fit"):
        check_sft_data(config)


def test_generated_and_mixed_examples_are_looked_at_too(tmp_path, tokenizer):
    config = sft(tmp_path, [GOOD], "data.path=null", "data.response_key=null", "data.source=chains", "sft.examples=20",
                 "batch.tokens_per_microbatch=16")
    with pytest.raises(ValueError, match=r"\d+ example\(s\) cannot be trained on.*\n  chains-all-7-\d+: prompt and"):
        check_sft_data(config)
    mixed = DataConfig(source="mix", mix={kind: DataConfig(source=kind, size=5) for kind in ("chains", "arithmetic")})
    source = build_prompts(mixed, tokenizer, Limits(max_example_tokens=100))
    assert len(source.objections(10)) == 5 and len(source.objections(4)) == 2
    assert all("no response to train on" in why for why in source.objections(10))


@pytest.mark.parametrize("override", ["data.shuffle=false", "data.weights.a=1"])
def test_orders_that_sft_does_not_read_are_refused(override, tmp_path, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    mix = ["data.source=mix", "data.mix.a.source=chains"]
    assert main(["sft", "--check", f"model.path={model}", *mix, override]) == 2
    assert f"{override.partition('=')[0].removesuffix('.a')}" in capsys.readouterr().err


def rl(tmp_path, number, *overrides):
    model = tmp_path / "model"
    if not model.exists():
        write_tiny_bailing(model)
    path = write_jsonl(tmp_path / "own.jsonl", [{**row, "prompt": row["prompt"].replace("What is", "Q")}
                                                for row in rows(number)])
    return load([f"model.path={model}", f"run.dir={tmp_path / 'run'}", f"data.path={path}", "data.split=train",
                 "reward.routes={math: exact}", *overrides])


def test_a_small_file_is_evaluated_on_what_is_held_out_and_says_so(tmp_path, capsys):
    check_data(config := rl(tmp_path, 100))
    said = capsys.readouterr().err
    number = int(said.split("set has ")[1].split(":")[0])
    assert "eval.problems=256, but the held-out set has" in said and 3 < number < 30
    assert number_evaluated(config, HELD_OUT, number)[0] == number
    assert number_evaluated(config, HELD_OUT, 999) == (256, "")


def test_a_file_without_held_out_problems_says_how_to_go_on_and_evaluation_can_be_off(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"none of them in data.split=heldout.*eval.problems=0"):
        check_data(rl(tmp_path, 2))
    check_data(rl(tmp_path, 2, "eval.problems=0"))
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="leaves nothing to evaluate"):
        check_data(rl(tmp_path, 2, "eval.problems=0"), training=False)


def test_a_benchmark_with_fewer_problems_than_asked_for_is_evaluated_whole(tmp_path, capsys):
    own = write_jsonl(tmp_path / "b.jsonl", [{"problem": "1+1", "answer": 2}])
    check_data(rl(tmp_path, 2, "eval.problems=0", "eval.benchmarks.b.problems=5", "eval.benchmarks.b.data.source=aime",
                  f"eval.benchmarks.b.data.path={own}"))
    assert "eval.benchmarks.b.problems=5, but the b set has 1: all of them are evaluated" in capsys.readouterr().err


def test_evaluated_problems_that_are_trained_on_are_counted_whatever_surrounds_them(tmp_path, capsys):
    given = [{"prompt": row["prompt"].replace("What is", "Q"), "answer": "1"} for row in rows(7)]
    own = write_jsonl(tmp_path / "b.jsonl", [*given, {"prompt": "Q 99", "answer": "1"}])
    overrides = ["data.split=all", f"eval.benchmarks.b.data.path={own}", "eval.benchmarks.b.data.prompt_suffix='!'"]
    check_data(rl(tmp_path, 20, "eval.problems=0", *overrides))
    assert "7 of the 8 problems of the b set are among those that are trained on" in capsys.readouterr().err
    check_data(rl(tmp_path, 20, f"eval.data.path={own}", "eval.problems=2", "data.split=all"))
    assert "7 of the 8 problems of the held-out set are among" in capsys.readouterr().err
    check_data(rl(tmp_path, 200, "eval.problems=2"))
    assert "among those" not in capsys.readouterr().err


def test_a_stage_is_looked_at_with_its_own_rewards(tmp_path):
    stages = "stages=[{name: a, steps: 1}, {name: b, steps: 1, set: {data.domain: essay, %s}}]"
    always = ["eval.problems=0", "run.steps=2"]
    check_data(rl(tmp_path, 2, *always, stages % "reward.routes.essay: exact"))
    with pytest.raises(ValueError, match=r"reward.routes.essay=llm_judge: llm_judge needs reward.judge.url"):
        check_data(rl(tmp_path, 2, *always, stages % "reward.routes.essay: llm_judge"))
    with pytest.raises(ValueError, match=r"reward.shaping=os.no_step: module os has no no_step"):
        check_functions(rl(tmp_path, 2, *always, stages % "reward.shaping: [{term: os.no_step}]"))


def test_a_bad_row_of_a_benchmark_is_found_before_the_start(tmp_path):
    lines = [json.dumps({"prompt": "1+1", "answer": "2"}), json.dumps({"prompt": "1+1"})]
    path = Path(tmp_path / "b.jsonl")
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"b.jsonl:2: no reference answer"):
        check_data(rl(tmp_path, 2, "eval.problems=0", f"eval.benchmarks.b.data.path={path}"))
