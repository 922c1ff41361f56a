"""Every source and every key: what a source does not read is refused, and the split parts every source."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron_rl.config.data import KEYS, DataConfig
from megatron_rl.config.load import load
from megatron_rl.data import Limits, build_prompts, chains_tokenizer, heldout
from tests.megatron_rl.data.shipped import NUMBER, SOURCES, keys_of, rows, write_jsonl

ANYTHING = Limits(max_prompt_tokens=100_000)
OTHER = {"path": "x", "hf_split": "test", "on_error": "skip", "prompt_key": "x", "answer_key": "x", "response_key": "x",
         "domain_key": "x", "id_key": "x", "domain": "x", "task": "x", "task_config": {"x": 1}, "size": 3, "seed": 3,
         "split": "train", "template": "chat", "prompt_prefix": "x", "prompt_suffix": "x", "shuffle": False,
         "weights": {"a": 1.0}, "curriculum": ({},)}
"""A value of each key that is not its default."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chains_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config_of(source, folder, **keys):
    return DataConfig(source=source, **{**keys_of(source, folder), **keys})


def texts(source):
    return [source.prompt(i).text for i in range(len(source))]


def test_the_lists_here_are_whole():
    names = {field.name for field in fields(DataConfig)}
    assert OTHER.keys() | {"source", "mix"} == names and KEYS.keys() == set(SOURCES) and len(SOURCES) == 13
    assert all(set(keys) <= names for keys in KEYS.values())


@pytest.mark.parametrize("key", sorted(OTHER))
@pytest.mark.parametrize("source", SOURCES)
def test_a_key_that_the_source_does_not_read_is_refused_by_name(source, key, tmp_path):
    if key in KEYS[source]:
        return
    with pytest.raises(ValueError, match=f"^{key}=.* is not read by source={source}, which reads"):
        config_of(source, tmp_path, **{key: OTHER[key]})


@pytest.mark.parametrize(("overrides", "named"), [
    (["data.source=aime", "data.size=3"], "data.size=3 is not read by source=aime"),
    (["data.source=mix", "data.mix.a.size=3"], "data.mix.a.size=3 is not read by source=jsonl"),
    (["data.source=mix", "data.mix.a.path=x", "data.template=chat"], "data.template='chat' is not read by source=mix"),
    (["data.source=mix", "data.mix.a.path=x", "data.mix.a.shuffle=false"], "data.mix.a.shuffle=false is not read"),
    (["data.source=mix", "data.split=train", "data.mix.a={path: x, split: heldout}"], "data.mix.a.split=heldout, but"),
    (["eval.data.source=aime", "eval.data.id_key=x"], "eval.data.id_key='x' is not read by source=aime"),
    (["eval.benchmarks.q.data.source=chains", "eval.benchmarks.q.data.path=x"],
     "eval.benchmarks.q.data.path='x' is not read by source=chains"),
    (["eval.data.path=x", "eval.data.shuffle=false"], "eval.data.shuffle=false is not read"),
    (["eval.data.source=mix", "eval.data.mix.a.path=x", "eval.data.weights.a=1"], "eval.data.weights is not read"),
])
def test_the_section_of_an_unread_key_is_named(overrides, named):
    with pytest.raises(ValueError) as caught:
        load(overrides)
    assert str(caught.value).startswith(named)


@pytest.mark.parametrize("source", SOURCES)
def test_training_and_heldout_problems_of_every_source_are_disjoint(source, tmp_path, tokenizer):
    config = config_of(source, tmp_path, split="train")
    train = texts(build_prompts(config, tokenizer, ANYTHING))
    held_out = texts(build_prompts(heldout(config, seed=99, size=NUMBER), tokenizer, ANYTHING))
    assert len(train) > 20 and held_out and not set(train) & set(held_out)
    if "size" not in KEYS[source] and source != "mix":  # a file: the two are all there is
        whole = texts(build_prompts(replace(config, split="all"), tokenizer, ANYTHING))
        assert sorted(train + held_out) == sorted(whole)


def test_the_heldout_set_of_a_mix_is_of_its_sections_in_the_ratio_of_sizes(tmp_path):
    config = config_of("mix", tmp_path, split="train", weights={"file": 1.0}, shuffle=False)
    held_out = heldout(config, seed=99, size=5)
    assert (held_out.split, held_out.weights) == ("all", {})
    assert {name: (part.split, part.seed) for name, part in held_out.mix.items()} == {
        "file": ("heldout", 7), "sums": ("heldout", 99)}


def test_a_question_is_in_one_split_whatever_surrounds_it(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    chats = [{"prompt": [*([{"role": "system", "content": system}] if system is not None else []),
                         {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": system or "no"}],
              "answer": row["answer"]} for row in rows(40) for system in (None, "", "Be short.", "Think.")]
    path = str(write_jsonl(tmp_path / "chats.jsonl", [*chats, *rows(40)]))
    asked = {split: {text.split("What")[1].strip("|") for text in texts(build_prompts(DataConfig(
        path=path, template="chat", split=split), tokenizer, ANYTHING))} for split in ("train", "heldout")}
    train, held_out = asked["train"], asked["heldout"]
    assert len(train) + len(held_out) == 40 and held_out and not train & held_out


OF_RL = sorted(path.stem for path in Path("conf/experiment").glob("*.yaml")
               if not path.stem.endswith(("_sft", "_general")))  # SFT evaluates nothing


@pytest.mark.parametrize("experiment", OF_RL)
def test_no_experiment_trains_on_what_it_evaluates(experiment, tokenizer):
    from megatron_rl.orchestrator.evaluation import evaluation_data

    config = load([f"experiment={experiment}"])
    evaluated = evaluation_data(config) or evaluation_data(load(["experiment=ring_mini"]))  # its pipeline evaluates
    sets = {"": config.data, **evaluated}
    files = [part.path for data in sets.values() for part in (data, *data.mix.values()) if part.path]
    if not all(Path(path).is_file() for path in files) or config.data.path is None and not (
            config.data.mix or config.data.source in ("chains", "arithmetic")):
        pytest.skip("its data are the user's")
    sources = {name: build_prompts(data, tokenizer, ANYTHING) for name, data in sets.items()}
    found = {name: {source.prompt(i).text for i in range(min(len(source), 2000))} for name, source in sources.items()}
    train = found.pop("")
    assert len(train) >= 20
    assert found and all(len(texts) > 2 and not texts & train for texts in found.values())
