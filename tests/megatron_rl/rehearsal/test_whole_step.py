"""Whole RL steps on a clock that passes at once, worked by hand. A decoding step takes 1 s, prefilling nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math

import numpy as np
import pytest

from megatron_rl.config.load import build
from megatron_rl.config.schema import Config
from megatron_rl.model.architectures import HF_FILES, parse_config
from megatron_rl.rehearsal.engines import Decoder, EngineRates, Engines, VirtualLoop, decoder_of
from megatron_rl.rehearsal.records import Lengths
from megatron_rl.rehearsal.whole_step import simulate_steps, variants
from tests.megatron_rl.rehearsal.tiny import NETWORK

SECOND = Decoder(slots=8, overhead_s=1.0, rate=1.0, token_bytes=0.0, always=0.0, rest=0.0, chosen=0.5,
                 prefill_tokens_per_s=math.inf)
TRAIN, PUBLISH = 0.5, 3.0
"""Seconds of training per token, and of a publish."""


def constant(tokens: int) -> Lengths:
    return Lengths("constant", lambda shares: np.full(len(shares), float(tokens)))


def steps_config(collector: str, *, phi: int, **rollout) -> Config:
    """2 prompts with two responses each; one update."""
    base = build({"algo": {"phi": phi, "scope": "global"}, "parallel": {"world_size": 1},
                  "batch": {"tokens_per_microbatch": 96},
                  "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2, "max_context_tokens": 64,
                              "max_response_tokens": 48, **rollout}})
    return next(each for each in variants(base) if each.rollout.collector == collector)


def steps_of(collector: str, tokens: int = 10, decoder: Decoder = SECOND, engines: int = 1, phi: int = 40, **rollout):
    return simulate_steps(steps_config(collector, phi=phi, **rollout), decoder, engines, constant(tokens),
                          train_s_per_token=TRAIN, publish_s=PUBLISH, steps=6)


def test_a_sync_step_is_rollout_and_training_and_publish():
    """Four sequences of 10 tokens decode together in 10 s; 40 tokens train in 20 s."""
    for step in steps_of("sync"):
        assert (step.rollout, step.train, step.seconds) == pytest.approx((10, 20, 33))
        assert (step.generated, step.trained, step.dropped, step.staleness) == pytest.approx((40, 40, 0, 0))
        assert step.engine_busy == pytest.approx(10 / 33)


def test_recorded_steps_come_one_after_the_other_and_a_budget_trains_as_many_tokens_of_each():
    """Responses of 10 and of 20 tokens by turns: 4 of them are 40 and 80 tokens, at half a second each; Phi is 30."""
    lengths = dataclasses.replace(constant(15), steps=(constant(10), constant(20)) * 2)
    budget = steps_config("sync", phi=30)
    made = simulate_steps(budget, SECOND, 1, lengths, train_s_per_token=TRAIN, publish_s=PUBLISH, steps=4)
    assert [(step.rollout, step.trained, step.train) for step in made] == [
        (pytest.approx(rollout), 30, pytest.approx(15)) for rollout in (10, 20, 10, 20)]
    without = dataclasses.replace(budget, algo=dataclasses.replace(budget.algo, objective="grpo"))
    made = simulate_steps(without, SECOND, 1, lengths, train_s_per_token=TRAIN, publish_s=PUBLISH, steps=4)
    assert [(step.trained, step.train) for step in made] == [
        (trained, pytest.approx(trained * TRAIN)) for trained in (40, 80, 40, 80)]


def test_sequences_beyond_the_slots_wait_their_turn():
    two = dataclasses.replace(SECOND, slots=2)
    assert steps_of("sync", decoder=two)[0].rollout == pytest.approx(20)
    assert steps_of("sync", decoder=two, engines=2)[0].rollout == pytest.approx(10)


def test_an_async_step_is_the_longer_of_sampling_and_training():
    """The engines sample while the ranks train, but for the publish: 10 + 3 s against 20 + 3, or 30 + 3 against 23."""
    assert [step.seconds for step in steps_of("async")[2:]] == pytest.approx([23] * 4)
    later = steps_of("async", tokens=30, phi=40)[2:]
    assert [step.seconds for step in later] == pytest.approx([33] * 4)
    assert max(step.oldest for step in later) == 1


def test_budgeted_samples_what_the_budget_needs_once_it_knows_a_mean():
    """Phi is 20: one of two groups. Both go out in the first step, one in the later ones."""
    first, *later = steps_of("budgeted", phi=20, overprovision=1.0)
    assert first.generated == pytest.approx(40)
    assert [step.generated for step in later] == pytest.approx([20] * 5)
    assert all(step.trained == 20 and step.rollout == pytest.approx(10) for step in later)


def test_budgeted_does_not_wait_for_what_it_leaves_out():
    """Lengths of 1 to 48: the step ends with the last response that the budget needs, and counts what it aborts."""
    lengths = Lengths("any", lambda shares: 48 * shares)
    made = {kind: simulate_steps(steps_config(kind, phi=40, prompts_per_step=8), SECOND, 2, lengths,
                                 train_s_per_token=TRAIN, publish_s=PUBLISH) for kind in ("sync", "budgeted")}
    assert all(step.dropped == 0 for step in made["sync"])
    assert sum(step.dropped for step in made["budgeted"]) > 0
    assert sum(step.rollout for step in made["budgeted"]) < sum(step.rollout for step in made["sync"])
    assert {step.trained for steps in made.values() for step in steps} == {40}


def test_partial_samples_its_budget_and_carries_the_rest():
    """Four open responses of 10 tokens, in slices of 5, 20 tokens a round: every second round finishes all four."""
    made = steps_of("partial", phi=20, slice_tokens=5, budget_tokens=20, prompts_per_step=2)
    assert [step.generated for step in made] == pytest.approx([40] * 6)  # two rounds fill a step
    assert [step.rollout for step in made] == pytest.approx([10] * 6)
    assert {step.rounds for step in made} == {2}


def test_a_paused_engine_stands_still_and_its_tokens_know_their_weights():
    """10 tokens, paused from 4 s to 6 s: the last at 12 s, 4 of version 0 and 6 of version 1."""
    loop = VirtualLoop()
    engines = Engines(loop, SECOND, 1, concurrency=8)

    async def publish():
        await asyncio.sleep(4)
        engines.pause()
        await asyncio.sleep(2)
        engines.resume(1)

    async def both():
        return (await asyncio.gather(engines.generate(5, 10, 5), publish()))[0]

    spans = loop.run_until_complete(both())
    assert loop.seconds == pytest.approx(12)
    assert [(span.version, span.start, span.end) for span in spans] == [(0, 0, 4), (1, 4, 10)]
    loop.close()


def test_a_step_reads_the_keys_and_values_of_what_is_held():
    """One sequence of 3 tokens context and 4 more: 4 x 1 s, and a byte a second for 3 to 7 tokens held."""
    decoder = dataclasses.replace(SECOND, token_bytes=1.0)
    assert decoder.seconds(4, 1, 3) == pytest.approx(4 + 4 * 3 + 4 * 4 / 2)
    assert decoder.tokens(decoder.seconds(4, 2, 3), 2, 3) == pytest.approx(4)


def test_prefilling_keeps_the_others_waiting():
    """Two sequences of 6 and 4 tokens context, at 2 tokens a second: 5 s before the first of 10 tokens."""
    loop = VirtualLoop()
    engines = Engines(loop, dataclasses.replace(SECOND, prefill_tokens_per_s=2.0), 1, concurrency=8)

    async def both():
        await asyncio.gather(engines.generate(6, 10, 6), engines.generate(4, 10, 4))

    loop.run_until_complete(both())
    assert loop.seconds == pytest.approx(15)
    loop.close()


def test_a_loop_in_which_everything_waits_says_so():
    loop = VirtualLoop()
    with pytest.raises(RuntimeError, match="stands still"):
        loop.run_until_complete(loop.create_future())
    loop.close()


@pytest.mark.parametrize(("network", "tp", "numbers"), [
    ("tests", 1, 2 * 2 * 2 * 16), ("tests", 2, 2 * 2 * 2 * 16),  # 2 layers, 2 heads of 16
    ("tests", 4, 2 * 2 * 4 * 16),  # each head on two of four ranks
    ("deepseek_v2_lite", 1, 27 * (512 + 64)), ("deepseek_v2_lite", 2, 2 * 27 * (512 + 64))])
def test_a_tokens_cache_is_its_keys_and_values_or_its_latent_vector_on_every_rank(network, tp, numbers):
    config = build({"model": {"dtype": "bfloat16"}, "rollout": {"engine": {"tp": tp}}})
    published = HF_FILES / f"{network}.json"
    sizes = NETWORK if network == "tests" else parse_config(json.loads(published.read_text()), network)
    assert decoder_of(sizes, config, EngineRates(), 100.0).token_bytes == 2 * numbers


def test_an_engine_without_room_for_one_sequence_names_the_key():
    config = build({"rollout": {"engine": {"mem_fraction_static": 0.01, "max_total_tokens": None}}})
    with pytest.raises(ValueError, match=r"rollout\.engine\.tp=1.*raise rollout\.engine\.tp"):
        decoder_of(NETWORK, config, EngineRates(gpu_memory=1e6), 100.0)
