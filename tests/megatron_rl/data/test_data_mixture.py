"""Mixed sources: exact ratios, a curriculum by prompts, and an order that goes on where it was."""

import json
from collections import Counter

import pytest

from megatron_rl.config.data import CurriculumStage
from megatron_rl.config.load import load
from megatron_rl.config.schema import DataConfig
from megatron_rl.data import Limits, build_prompts, build_sampler, chains_tokenizer

PARTS = {"sums": {"source": "chains", "size": 30}, "shots": {"source": "arithmetic", "size": 10}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chains_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def mixed(tokenizer, **keys):
    config = DataConfig(source="mix", mix={name: DataConfig(**part) for name, part in PARTS.items()}, **keys)
    source = build_prompts(config, tokenizer, Limits(max_prompt_tokens=200))
    return source, build_sampler(source, config, seed=1)


def domains(prompts):
    return "".join({"math": "m", "arithmetic": "a"}[prompt.domain] for prompt in prompts)


def test_every_prefix_keeps_the_weights(tokenizer):
    _, sampler = mixed(tokenizer, weights={"sums": 7, "shots": 3})
    dealt = domains(sampler.next(200))
    assert all(abs(dealt[:n].count("a") - 0.3 * n) < 1 for n in range(1, 201))
    _, sampler = mixed(tokenizer)  # without weights: 30 to 10
    assert Counter(domains(sampler.next(40))) == {"m": 30, "a": 10}


def test_each_part_keeps_its_own_order(tokenizer):
    """Over 60 draws of the part of 30: each of its problems twice, whatever lies between."""
    _, sampler = mixed(tokenizer, weights={"sums": 1, "shots": 1})
    seen = Counter(prompt.id for prompt in sampler.next(120) if prompt.domain == "math")
    assert len(seen) == 30 and set(seen.values()) == {2}


CURRICULUM = [{"weights": {"sums": 1}, "prompts": 5}, {"weights": {"sums": 1, "shots": 1}, "prompts": 6},
              {"weights": {"shots": 1}}]


def test_a_curriculum_changes_after_its_prompts():
    curriculum = json.dumps(CURRICULUM).replace('"', "")
    config = load(["experiment=quickstart", "data.source=mix", f"data.curriculum={curriculum}",
                   *(f"data.mix.{name}.{key}={value}" for name, part in PARTS.items() for key, value in part.items())])
    assert [stage.prompts for stage in config.data.curriculum] == [5, 6, None]


@pytest.mark.parametrize("dealt", [0, 3, 5, 8, 11, 40])
def test_a_resumed_curriculum_goes_on_exactly(tokenizer, dealt):
    keys = {"curriculum": tuple(CurriculumStage(**stage) for stage in CURRICULUM)}
    _, sampler = mixed(tokenizer, **keys)
    before = sampler.next(dealt)
    state = json.loads(json.dumps(sampler.state_dict()))
    _, resumed = mixed(tokenizer, **keys)
    resumed.load_state_dict(state)
    after = resumed.next(20)
    assert [p.id for p in after] == [p.id for p in sampler.next(20)]
    whole = domains([*before, *after])
    assert whole.startswith("mmmmm" + "mamama"[:max(0, len(whole) - 5)]) and set(whole[11:]) == {"a"}


def test_new_weights_start_from_here_and_repeat_no_problem(tokenizer):
    _, first = mixed(tokenizer, weights={"sums": 1})
    before = first.next(20)
    _, second = mixed(tokenizer, weights={"sums": 1, "shots": 1})
    second.load_state_dict(first.state_dict())
    after = second.next(10)
    assert domains(after).count("a") == 5
    assert not {p.id for p in before} & {p.id for p in after}


def test_another_mix_is_refused(tokenizer):
    _, sampler = mixed(tokenizer)
    state = sampler.state_dict()
    state["parts"]["other"] = state["parts"].pop("shots")
    with pytest.raises(ValueError, match="data.mix changed"):
        sampler.load_state_dict(state)


def test_by_index_the_parts_are_interleaved_and_the_split_holds_for_all(tokenizer):
    source, _ = mixed(tokenizer)
    assert Counter(domains(source.prompt(i) for i in range(20))) == {"m": 15, "a": 5} and len(source) == 40
    heldout, _ = mixed(tokenizer, split="heldout")
    assert source.domains == {"math", "arithmetic"}
    assert all("-heldout-" in heldout.prompt(i).id for i in range(40))


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.source=mix"], "needs data.source=mix and its sections"),
    (["data.mix.a.source=chains"], "data.source=chains with data.mix"),
    (["data.source=mix", "data.mix.a.source=chains", "data.weights.b=1"], "data.weights names b; data.mix has a"),
    (["data.source=mix", "data.mix.a.source=chains", "data.weights.a=0"], "one of them must be positive"),
    (["data.source=mix", "data.mix.a.source=chains", "data.curriculum=[{prompts:3}]"], "every stage but the last"),
])
def test_a_wrong_mix_names_its_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(["experiment=quickstart", *overrides])
