"""Orders of prompts: every prompt once an epoch, or by pass rate; seeded, with exact resume."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from megatron_rl.config.load import load
from megatron_rl.config.rollout import PassRateConfig
from megatron_rl.config.schema import DataConfig
from megatron_rl.data import (
    Limits,
    PassRateSampler,
    PromptSampler,
    build_rated_sampler,
    build_source,
    chains_tokenizer,
)
from megatron_rl.data.mixture import MixedSource
from megatron_rl.data.sampler import draw_weights


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tokenizer = chains_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return lambda size, seed=7: build_source(DataConfig(source="chains", size=size, seed=seed), tokenizer,
                                             Limits(max_prompt_tokens=64))


def ids(prompts):
    return [prompt.id for prompt in prompts]


def test_each_epoch_deals_every_prompt_once_in_another_order(source):
    sampler = PromptSampler(source(40), seed=3)
    first, second = ids(sampler.next(40)), ids(sampler.next(40))
    assert sorted(first) == sorted(second) == sorted({*first}) and first != second
    assert ids(PromptSampler(source(40), seed=3).next(80)) == first + second
    assert ids(PromptSampler(source(40), seed=4).next(40)) != first


def test_one_draw_may_span_several_epochs(source):
    sampler = PromptSampler(source(5), seed=3)
    dealt = ids(sampler.next(13))
    assert dealt == ids(PromptSampler(source(5), seed=3).next(7)) + dealt[7:] and len(set(dealt[5:10])) == 5


@pytest.mark.parametrize("dealt", [0, 1, 6, 7, 8, 20, 21])
def test_a_resumed_sampler_goes_on_exactly(source, dealt):
    sampler = PromptSampler(source(7), seed=3)
    sampler.next(dealt)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = PromptSampler(source(7), seed=3)
    resumed.next(2)
    resumed.load_state_dict(state)
    assert ids(resumed.next(30)) == ids(sampler.next(30))


def test_without_shuffle_the_order_is_the_source_order(source):
    sampler = PromptSampler(source(4), seed=3, shuffle=False)
    assert ids(sampler.next(6)) == ids(source(4).prompt(i) for i in (0, 1, 2, 3, 0, 1))


@pytest.mark.parametrize(("size", "seed", "shuffle", "named"), [
    (8, 3, True, "size=7, this run has 8"), (7, 4, True, "run.seed"), (7, 3, False, "data.shuffle")])
def test_a_state_of_another_order_is_refused(source, size, seed, shuffle, named):
    state = PromptSampler(source(7), seed=3).state_dict()
    with pytest.raises(ValueError, match=named):
        PromptSampler(source(size), seed=seed, shuffle=shuffle).load_state_dict(state)


# ---- draws by pass rate (rollout.pass_rate) ----------------------------------------------------------------------

RATES = PassRateConfig(enabled=True, low=0.2, high=0.9, floor=0.1, memory=0.25)


def test_weights_by_hand():
    # never judged; below the band; 4 * 0.25 * 0.75; 1/2; 4 * 0.9 * 0.1; above the band
    found = draw_weights(np.array([np.nan, 0.1, 0.25, 0.5, 0.9, 0.95]), RATES)
    assert found.tolist() == pytest.approx([1.0, 0.1, 0.75, 1.0, 0.36, 0.1], abs=1e-12)


def test_a_pass_rate_is_that_of_the_first_group_and_then_a_running_mean(source):
    sampler = PassRateSampler(source(3), 3, RATES)
    prompt, other = sampler.next(2)
    for rate in (0.5, 1.0, 0.0):
        sampler.observe(prompt, rate)
    sampler.observe(replace(other, text="of another section, with the same id"), 1.0)
    sampler.observe(replace(other, id="nobody"), 1.0)
    seen = sampler.rates[~np.isnan(sampler.rates)]
    assert seen.tolist() == [0.25 * (0.25 * 0.5 + 0.75 * 1.0)]


def test_prompts_are_drawn_as_often_as_the_formula_says(source):
    """8,000 draws of one prompt each: every count within 4.5 standard deviations, and chi-square not surprised."""
    sampler = PassRateSampler(source(8), 3, RATES)
    dealt = {prompt.id: prompt for prompt in sampler.next(8)}
    assert len(dealt) == 8, "one call deals no prompt twice while others are left"
    for prompt, rate in zip(dealt.values(), (0.0, 0.2, 0.25, 0.4, 0.5, 0.8, 0.9, 1.0), strict=True):
        sampler.observe(prompt, rate)
    weights = draw_weights(sampler.rates, RATES)
    draws = 8000
    counts = Counter(sampler.next(1)[0].id for _ in range(draws))
    found = np.array([counts[sampler._source.prompt(place).id] for place in range(8)])
    expected = draws * weights / weights.sum()
    assert (abs(found - expected) < 4.5 * np.sqrt(expected)).all(), (found, expected)
    assert ((found - expected) ** 2 / expected).sum() < 24.3  # 99.9% of chi-square with 7 degrees of freedom
    pairs = Counter(sampler.next(2)[1].id for _ in range(1000))  # the second is of those that are left
    assert all(len({prompt.id for prompt in sampler.next(8)}) == 8 for _ in range(20)) and len(pairs) == 8


def test_one_call_deals_no_prompt_of_a_mix_twice_either(source):
    config = DataConfig(source="mix", mix={name: DataConfig(source="chains", size=8) for name in "ab"})
    sampler = build_rated_sampler(MixedSource({"a": source(8), "b": source(8, 8)}), config, 3, RATES)
    for _ in range(5):
        assert len({prompt.text for prompt in sampler.next(16)}) == 16


def test_a_sampler_that_loads_a_state_draws_what_the_other_would_have_drawn(source):
    config = DataConfig(source="mix", mix={"a": DataConfig(source="chains", size=20),
                                           "b": DataConfig(source="chains", size=20, seed=8)}, weights={"a": 2, "b": 1})
    mixed = MixedSource({name: source(20, part.seed) for name, part in config.mix.items()})
    for parts, given in ((source(20), DataConfig(source="chains")), (mixed, config)):
        first = build_rated_sampler(parts, given, 3, RATES)
        for round_ in range(6):
            for place, prompt in enumerate(first.next(5)):
                first.observe(prompt, (place + round_) % 5 / 4)
        second = build_rated_sampler(parts, given, 3, RATES)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for _ in range(4):
            ours, theirs = first.next(5), second.next(5)
            assert ids(ours) == ids(theirs) and [each.text for each in ours] == [each.text for each in theirs]
            for prompt in ours:
                first.observe(prompt, 0.75)
                second.observe(prompt, 0.75)
        assert first.state_dict() == second.state_dict() and first.metrics() == second.metrics()
    assert set(first.metrics()) == {f"prompts/{name}" for name in (
        "judged_fraction", "effective_fraction", "pass_rate", "in_band_fraction")}


def test_an_order_of_another_kind_cannot_go_on(source):
    rated, plain = PassRateSampler(source(7), 3, RATES), PromptSampler(source(7), 3)
    for sampler, state in ((rated, plain.state_dict()), (plain, rated.state_dict())):
        with pytest.raises(ValueError, match=r"another kind: rollout\.pass_rate\.enabled changed"):
            sampler.load_state_dict(state)
    for other, key in ((PassRateSampler(source(8), 3, RATES), "the data"), (
            PassRateSampler(source(7), 4, RATES), "run.seed")):
        with pytest.raises(ValueError, match=f"{key} changed"):
            other.load_state_dict(rated.state_dict())


@pytest.mark.parametrize(("overrides", "said"), [
    (["rollout.pass_rate.low=0.9"], "low=0.9 and high=0.9"), (["rollout.pass_rate.floor=0"], "floor=0.0"),
    (["rollout.pass_rate.memory=1"], "memory=1.0")])
def test_a_wrong_key_of_the_pass_rates_is_named(overrides, said):
    with pytest.raises(ValueError, match=said):
        load(overrides)
