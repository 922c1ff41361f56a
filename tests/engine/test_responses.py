"""Every prompt gets its K judged responses, once each, whatever fails on the way."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megatron_rl.config.rollout import ENGINE_KEY
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.responses import Responder, SamplingPlan, sampling_seed
from megatron_rl.rollout.sampling import GenerateResult
from megatron_rl.types import Finish, Prompt, RolloutGroup, Score
from tests.engine.conftest import PROMPTS, ROLLOUT, LiveEngine, in_time, seen_to_run
from tests.reference_bailing import response_logprobs


class LengthScorer:
    """Judges a response by the length of its text."""

    def __init__(self):
        self.judged: list[str] = []

    async def score(self, prompt: Prompt, response_text: str) -> Score:
        self.judged.append(prompt.id)
        return Score(value=float(len(response_text)), status="correct")


def make_prompts(count: int = len(PROMPTS)) -> list[Prompt]:
    return [
        Prompt(id=f"p{number}", token_ids=PROMPTS[number], text="", answer="", domain="math")
        for number in range(count)
    ]


@pytest.fixture()
def tokenizer(live_engine: LiveEngine) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(live_engine.folder)


@pytest.fixture()
def dead_client() -> EngineClient:
    return EngineClient(f"http://127.0.0.1:{choose_port(None)}")


def collect(clients, tokenizer, prompts, config=ROLLOUT, scorer=None, **how):
    """One group per prompt, from a fleet that lives as long as this call."""

    async def groups():
        fleet = Fleet(clients, config)
        await fleet.start()
        try:
            responder = Responder(fleet, config, tokenizer, scorer or LengthScorer(), seed=3, eos_token_id=0)
            return await responder.groups(prompts, **{"step": 1, **how})
        finally:
            await fleet.close()

    return asyncio.run(groups())


def test_k_responses_per_prompt_as_the_engine_sampled_them(live_engine: LiveEngine, tokenizer):
    groups = collect([live_engine.client], tokenizer, make_prompts())
    assert [group.prompt.id for group in groups] == ["p0", "p1", "p2", "p3"]
    for group in groups:
        prompt = group.prompt.token_ids
        assert len(group.rollouts) == len(group.texts) == len(group.scores) == 3
        for rollout, text, score in zip(group.rollouts, group.texts, group.scores, strict=True):
            response = rollout.token_ids[len(prompt):]
            assert rollout.token_ids.dtype == np.int32 and rollout.rollout_logprobs.dtype == np.float32
            assert rollout.token_ids[: len(prompt)].tolist() == list(prompt)
            assert rollout.trainable.tolist() == [False] * len(prompt) + [True] * len(response)
            assert rollout.finish is (Finish.STOP if response[-1] == 0 else Finish.LENGTH)
            assert rollout.response_tokens == 16 or rollout.finish is Finish.STOP
            assert text == tokenizer.decode(response.tolist(), skip_special_tokens=True)
            assert score.value == len(text)
            assert [span.version for span in rollout.weight_versions] == [live_engine.version]
            reference = response_logprobs(live_engine.weights, live_engine.config, prompt, response.tolist())
            assert (reference - torch.from_numpy(rollout.rollout_logprobs[len(prompt):])).abs().max() < 1e-4
            assert not rollout.rollout_logprobs[: len(prompt)].any()


def test_samples_of_a_prompt_differ(live_engine: LiveEngine, tokenizer):
    (group,) = collect([live_engine.client], tokenizer, make_prompts(1))
    assert len({rollout.token_ids.tobytes() for rollout in group.rollouts}) > 1


def test_evaluation_plan_replaces_count_length_and_temperature(live_engine: LiveEngine, tokenizer):
    plan = replace(SamplingPlan.from_config(ROLLOUT), samples_per_prompt=2, temperature=0.0, max_response_tokens=5)
    groups = collect([live_engine.client], tokenizer, make_prompts(), step=0, tag="eval", plan=plan)
    assert len(groups) == len(make_prompts()) > 1
    for group in groups:
        first, second = group.rollouts
        assert first.response_tokens <= 5
        assert first.token_ids.tolist() == second.token_ids.tolist()  # greedy


def test_failed_request_is_retried_on_another_engine_and_counted_once(live_engine, tokenizer, dead_client):
    scorer = LengthScorer()
    groups = collect([dead_client, live_engine.client], tokenizer, make_prompts(), scorer=scorer)
    assert [len(group.rollouts) for group in groups] == [3, 3, 3, 3]
    assert sorted(scorer.judged) == sorted(["p0", "p1", "p2", "p3"] * 3)


def too_long(prompt: Prompt) -> Prompt:
    """For the engine, whose context has 512 tokens and the 6 that it keeps."""
    return replace(prompt, token_ids=(5,) * 600)


def impatient(**changes):
    return replace(ROLLOUT, engine=replace(ROLLOUT.engine, wait_timeout_s=0.5), **changes)


def failures(group: RolloutGroup) -> list[str]:
    """What is said of the responses of a group that failed whole."""
    assert [score.status for score in group.scores] == ["engine_error"] * len(group.scores)
    assert all(rollout.finish is Finish.ERROR and not rollout.response_tokens for rollout in group.rollouts)
    return [score.detail for score in group.scores]


def test_no_engine_left_names_request_and_engine(tokenizer, dead_client):
    [group] = collect([dead_client], tokenizer, make_prompts(1), impatient())
    assert all(re.match(rf"request train-1-0-p0-\d-0: no engine served .*{dead_client.base_url}", said)
               for said in failures(group))


def test_a_request_that_can_never_succeed_is_asked_once_and_says_why(live_engine, tokenizer):
    [group] = collect([live_engine.client], tokenizer, [too_long(make_prompts(1)[0])],
                      replace(ROLLOUT, max_context_tokens=2048))
    assert all(re.match(r"request train-1-0-p0-\d-0-0\. can never succeed: .*HTTP 400", said)
               for said in failures(group))


class Keeping(EngineClient):
    """Keeps how its requests ended at the engine."""

    def __init__(self, url: str):
        super().__init__(url, api_key=os.environ[ENGINE_KEY])
        self.ends: list[Finish] = []

    async def generate(self, *arguments, **options) -> GenerateResult:
        result = await super().generate(*arguments, **options)
        self.ends.append(result.finish)
        return result


def test_a_prompt_that_fails_leaves_the_others_alone(live_engine: LiveEngine, tokenizer):
    first, second = make_prompts(2)
    whole, failed = collect([live_engine.client], tokenizer, [first, too_long(second)],
                            replace(ROLLOUT, max_context_tokens=2048))
    assert failures(failed) and not any(score.failed for score in whole.scores)
    assert all(rollout.response_tokens for rollout in whole.rollouts)


def test_who_is_cancelled_aborts_what_still_runs(live_engine: LiveEngine, tokenizer):
    config = replace(ROLLOUT, max_context_tokens=2048, max_response_tokens=500)
    attempts = itertools.count()

    def ends() -> list[Finish]:
        number = next(attempts)  # the engine may still be ending the requests of the one before, and knows their ids
        client = Keeping(live_engine.process.base_url)
        prompts = [replace(prompt, id=f"{prompt.id}-{number}") for prompt in make_prompts(2)]

        async def cancelled() -> None:
            fleet = Fleet([client], config)
            await fleet.start()
            try:
                responder = Responder(fleet, config, tokenizer, LengthScorer(), seed=3, eos_token_id=0)
                work = asyncio.create_task(responder.groups(prompts, step=1))
                await seen_to_run(client, work)
                work.cancel()
                await asyncio.wait([work])
            finally:
                await fleet.close()

        asyncio.run(cancelled())
        return client.ends

    in_time(ends, lambda ends: Finish.ABORT in ends)


def test_prompt_too_long_for_the_engine_is_named(live_engine: LiveEngine, tokenizer):
    prompt = Prompt(id="long", token_ids=(5,) * 500, text="", answer="", domain="math")
    with pytest.raises(ValueError, match="prompt 'long' has 500 tokens.*rollout.max_context_tokens=512"):
        collect([live_engine.client], tokenizer, [prompt])


def test_every_part_of_the_key_changes_the_seed():
    base = sampling_seed(1, "train", 2, 3, 4)
    others = [sampling_seed(9, "train", 2, 3, 4), sampling_seed(1, "eval", 2, 3, 4), sampling_seed(1, "train", 9, 3, 4),
              sampling_seed(1, "train", 2, 9, 4), sampling_seed(1, "train", 2, 3, 9)]
    assert len({base, *others}) == 6
    assert all(0 <= seed < 2**63 for seed in (base, *others))
    assert base == sampling_seed(1, "train", 2, 3, 4)
