"""PromptSampler: every prompt once an epoch, a seeded order, exact resume."""

import json

import pytest

from megatron_rl.config.schema import DataConfig
from megatron_rl.data import Limits, PromptSampler, build_source, chains_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tokenizer = chains_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return lambda size: build_source(DataConfig(source="chains", size=size), tokenizer, Limits(max_prompt_tokens=64))


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
