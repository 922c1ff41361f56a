"""Bookkeeping of the collectors: no length bias, no token lost, nothing older than allowed."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace

import numpy as np
import pytest

from megatron_rl.batch import BudgetFill, assemble
from megatron_rl.config.rollout import PassRateConfig, RolloutConfig
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.data import PassRateSampler
from megatron_rl.rollout.collectors import AheadCollector, BudgetedCollector, PartialCollector, SyncCollector
from megatron_rl.rollout.fleet import FleetError
from megatron_rl.types import Prompt
from tests.megatron_rl.rollout.scripted import (
    Counting,
    ScriptedFleet,
    ks_rejects,
    length_of,
    responder,
    response_tokens_of,
    run,
)

LIMIT = 400
K = 4
CONFIG = RolloutConfig(prompts_per_step=24, responses_per_prompt=K, max_response_tokens=LIMIT, max_context_tokens=512)
ALGO = AlgoConfig(phi=800, order="groups")
STEPS = 25


def budgeted(fleet: ScriptedFleet, *, seed: int = 0, algo: AlgoConfig = ALGO, **changes) -> BudgetedCollector:
    fill = BudgetFill(algo, 1, LIMIT)
    return BudgetedCollector(responder(fleet, CONFIG, seed=seed), Counting(), fill, seed=seed, **{
        "prompts_per_step": CONFIG.prompts_per_step, "overprovision": CONFIG.overprovision, **changes})


def partial(fleet: ScriptedFleet, **changes) -> PartialCollector:
    return PartialCollector(responder(fleet, CONFIG), Counting(), **{
        "prompts_per_step": 12, "budget_tokens": 900, "slice_tokens": 32, "retention_steps": 50, "concurrency": 16,
        **changes})


def trained(groups, algo: AlgoConfig, step: int) -> list:
    return [sample for batch in assemble(groups, algo, dp=1, seed=0, step=step, max_response_tokens=LIMIT)
            for sample in batch.samples]


def draw_lengths(count: int) -> list[int]:
    return [length_of(10**6 + i, LIMIT) for i in range(count)]


def test_budgeted_does_not_favour_a_length():
    async def all_steps() -> list[int]:
        collector = budgeted(ScriptedFleet(limit=LIMIT, slots=32))
        lengths = []
        for step in range(STEPS):
            groups, _ = await collector.collect(step, 0)
            lengths += [sample.num_response_tokens for sample in trained(groups, ALGO, step)]
        return lengths

    lengths = run(all_steps())
    assert len(lengths) > 700
    assert not ks_rejects(lengths, draw_lengths(6000))


def test_partial_does_not_favour_a_length():
    async def all_steps() -> list[int]:
        collector = partial(ScriptedFleet(limit=LIMIT))
        groups = [group for step in range(2 * STEPS) for group in (await collector.collect(step, 0))[0]]
        return [rollout.response_tokens for group in groups for rollout in group.rollouts]

    lengths = run(all_steps())
    assert len(lengths) > 700
    assert not ks_rejects(lengths, draw_lengths(6000))


def test_the_test_of_length_bias_rejects_taking_what_finishes_first():
    async def first_finished(step: int) -> list[int]:
        asked = responder(ScriptedFleet(limit=LIMIT, slots=32), CONFIG)
        tasks = [asyncio.create_task(asked.respond(ticket, asked.plan)) for index, prompt in enumerate(
            Counting().next(24)) for ticket in asked.tickets(prompt, step=step, index=index)]
        lengths: list[int] = []
        for task in asyncio.as_completed(tasks):
            lengths.append((await task).rollout.response_tokens)
            if sum(lengths) >= ALGO.phi:
                break
        return lengths

    lengths = [length for step in range(STEPS) for length in run(first_finished(step))]
    assert ks_rejects(lengths, draw_lengths(6000))


@pytest.mark.parametrize("changes", [
    {}, {"updates_per_rollout": 3, "phi": 300}, {"dynamic_sampling": True}, {"truncated": "mask"},
    {"cutoff": "response"}, {"truncated": "overlong_penalty", "overlong_buffer_tokens": 100, "dynamic_sampling": True}],
    ids=lambda changes: "-".join(changes) or "plain")
def test_budgeted_trains_on_what_sampling_everything_would_train_on(changes):
    """And it samples less: with the same prompts and lengths, sync's groups in the same order are cut alike."""
    algo = replace(ALGO, **changes)

    async def both(step: int):
        collector = budgeted(ScriptedFleet(limit=LIMIT, slots=16), algo=algo)
        groups, ledger = await collector.collect(step, 0)
        fleet = ScriptedFleet(limit=LIMIT)
        everything = SyncCollector(responder(fleet, CONFIG), Permuted(step), prompts_per_step=CONFIG.prompts_per_step)
        whole, _ = await everything.collect(step, 0)
        return groups, whole, ledger, fleet.delivered

    class Permuted(Counting):
        def __init__(self, step: int):
            super().__init__()
            self._step = step

        def next(self, n: int):
            drawn = super().next(n)
            return [drawn[i] for i in np.random.default_rng([0, self._step, 0]).permutation(n)]

    for step in range(2):
        groups, whole, ledger, all_tokens = run(both(step))
        few, many = trained(groups, algo, step), trained(whole, algo, step)
        assert len(groups) < len(whole)
        assert [(s.index, s.token_ids.tobytes(), s.advantage) for s in few] == [
            (s.index, s.token_ids.tobytes(), s.advantage) for s in many]
        assert ledger.generated_tokens < all_tokens


def test_budgeted_collects_further_rounds_until_the_budget_is_full():
    algo = replace(ALGO, phi=6000)

    async def rounds() -> int:
        collector = budgeted(ScriptedFleet(limit=LIMIT), algo=algo)
        groups = []
        for round_ in range(8):
            more, _ = await collector.collect(0, round_)
            groups += more
            if sum(sample.loss_mask.sum() for sample in trained(groups, algo, 0)) == algo.phi:
                return round_ + 1
        raise AssertionError("never full")

    assert run(rounds()) > 1


def test_overprovisioning_bounds_what_is_sampled_in_vain():
    async def generated(overprovision: float) -> int:
        collector = budgeted(ScriptedFleet(limit=LIMIT), overprovision=overprovision)
        return sum([(await collector.collect(step, 0))[1].generated_tokens for step in range(8)][1:])

    assert run(generated(1.0)) < 0.8 * run(generated(100.0))


def test_budgeted_expects_after_a_resume_what_it_would_have_expected():
    """Without the running mean it would begin every continuation with all its groups at once."""
    async def asked(*, resumed: bool) -> list[int]:
        collector, counts = budgeted(ScriptedFleet(limit=LIMIT), overprovision=1.0), []
        for step in range(6):
            counts.append((await collector.collect(step, 0))[1].generated_tokens)
            if resumed:
                state = copy.deepcopy(collector.state_dict())
                collector = budgeted(ScriptedFleet(limit=LIMIT), overprovision=1.0)
                collector.load_state_dict(state)
        return counts

    assert run(asked(resumed=True)) == run(asked(resumed=False))


@pytest.mark.parametrize("seed", range(3))
def test_every_sampled_token_is_trained_carried_or_dropped(seed):
    """Random budgets, failing attempts, a retention limit that bites: the account closes to the token."""
    chance = np.random.default_rng(seed)

    async def check() -> None:
        fleet = ScriptedFleet(limit=LIMIT, failures=0.1)
        collector = partial(fleet, retention_steps=2, budget_tokens=int(chance.integers(300, 900)),
                            slice_tokens=int(chance.integers(5, 60)))
        handed, dropped, carried = 0, 0, 0
        for step in range(15):
            fleet.version = step
            delivered = fleet.delivered
            groups, ledger = await collector.collect(step, 0)
            assert ledger.generated_tokens == fleet.delivered - delivered
            assert carried + ledger.generated_tokens == (
                ledger.returned_tokens + ledger.dropped_tokens + ledger.carried_tokens)
            returned = sum(rollout.response_tokens for group in groups for rollout in group.rollouts)
            assert ledger.returned_tokens == returned
            handed, dropped, carried = handed + returned, dropped + ledger.dropped_tokens, ledger.carried_tokens
            assert all(step - span.version <= 2 for group in groups for rollout in group.rollouts
                       for span in rollout.weight_versions)
        assert fleet.delivered == handed + dropped + carried
        assert dropped > 0 and carried > 0 and handed > 0

    run(check())


def test_partial_spends_its_budget_to_the_token():
    async def check() -> None:
        collector = partial(ScriptedFleet(limit=LIMIT))
        for step in range(10):
            _, ledger = await collector.collect(step, 0)
            assert ledger.generated_tokens == 900

    run(check())


def test_a_continued_response_is_the_one_that_was_begun():
    """Tokens, log-probabilities and the version that sampled each token, across slices, rounds and a checkpoint."""

    async def check() -> None:
        fleet = ScriptedFleet(limit=LIMIT)
        collector, finished = partial(fleet, slice_tokens=10), []
        for step in range(8):
            fleet.version = step
            groups, _ = await collector.collect(step, 0)
            finished += [rollout for group in groups for rollout in group.rollouts]
            state = copy.deepcopy(collector.state_dict())
            collector = partial(fleet, slice_tokens=10)
            collector.load_state_dict(state)
        several = 0
        for rollout in finished:
            count = rollout.response_tokens
            tokens = rollout.token_ids[1:]
            assert (rollout.rollout_logprobs[1:] == -tokens).all()
            spans = rollout.weight_versions
            assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])] and spans[-1].end == count
            assert [span.version for span in spans] == sorted({span.version for span in spans})
            several += len(spans) > 1
        assert several > 5
        known = {response_tokens_of(seed, length_of(seed, LIMIT)).tobytes() for seed in fleet.seeds}
        assert {rollout.token_ids[1:].tobytes() for rollout in finished} <= known

    run(check())


class Refusing(ScriptedFleet):
    """No engine answers every seventh request, first slice or later."""

    def __init__(self, **options):
        super().__init__(**options)
        self._asked = 0

    async def generate(self, *args, rid: str, **kwargs):
        self._asked += 1
        if self._asked % 7 == 0:
            raise FleetError(f"request {rid}: no response after 4 attempts")
        return await super().generate(*args, rid=rid, **kwargs)


class RefusingAll(ScriptedFleet):
    async def generate(self, *args, rid: str, **kwargs):
        await asyncio.sleep(1)
        raise FleetError(f"request {rid}: no response after 4 attempts")


def test_partial_ends_a_round_in_which_everything_fails():
    """Failed responses spend nothing of the budget, so it would never end; the run sees the failed groups."""
    groups, ledger = run(asyncio.wait_for(partial(RefusingAll(limit=LIMIT)).collect(0, 0), 10**4))
    assert len(groups) == 12 and ledger.generated_tokens == 0
    assert {score.status for group in groups for score in group.scores} == {"engine_error"}


@pytest.mark.parametrize("make", [budgeted, partial, lambda fleet: SyncCollector(
    responder(fleet, CONFIG), Counting(), prompts_per_step=CONFIG.prompts_per_step)],
    ids=["budgeted", "partial", "sync"])
def test_requests_that_nobody_answers_cost_their_responses_and_nothing_else(make):
    """Every group stays whole, the budget is met by the others, and the account of the tokens closes."""

    async def check() -> None:
        fleet = Refusing(limit=LIMIT)
        collector, failed, whole, carried = make(fleet), 0, 0, 0
        for step in range(6):
            delivered = fleet.delivered
            groups, ledger = await collector.collect(step, 0)
            assert carried + fleet.delivered - delivered == (
                ledger.returned_tokens + ledger.dropped_tokens + ledger.carried_tokens)
            carried = ledger.carried_tokens
            scores = [score for group in groups for score in group.scores]
            assert all(len(group.scores) == K for group in groups)
            failed += sum(score.failed for score in scores)
            whole += sum(not score.failed for score in scores)
            if groups:
                kept = {sample.index for sample in trained(groups, ALGO, step)}
                assert kept and not any(scores[index].failed for index in kept)
        assert failed > 5 and whole > 5

    run(check())


def test_resumed_partial_goes_on_as_if_nothing_had_happened():
    async def groups_of(collector: PartialCollector, steps: range) -> list[bytes]:
        return [rollout.token_ids.tobytes() for step in steps
                for group in (await collector.collect(step, 0))[0] for rollout in group.rollouts]

    async def check() -> None:
        whole = partial(ScriptedFleet(limit=LIMIT))
        expected = await groups_of(whole, range(6))
        first, second = partial(ScriptedFleet(limit=LIMIT)), partial(ScriptedFleet(limit=LIMIT))
        begun = await groups_of(first, range(3))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert begun + await groups_of(second, range(3, 6)) == expected

    run(check())


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_async_runs_ahead_no_further_than_allowed_and_does_so(staleness):
    async def check() -> None:
        fleet = ScriptedFleet(limit=LIMIT)
        collector = AheadCollector(responder(fleet, CONFIG), Counting(), prompts_per_step=4, max_staleness=staleness,
                                   last_step=7)
        oldest = []
        for step in range(8):
            groups, _ = await collector.collect(step, 0)
            oldest.append(step - min(span.version for group in groups for rollout in group.rollouts
                                     for span in rollout.weight_versions))
            await asyncio.sleep(10 * LIMIT)  # training: what runs ahead ends meanwhile
            fleet.version = step + 1
        assert max(oldest) == staleness and oldest[0] == 0

    run(check())


def test_steps_under_way_together_have_accounts_of_their_own():
    async def check() -> None:
        collector = AheadCollector(responder(ScriptedFleet(limit=LIMIT, slots=8), CONFIG), Counting(),
                                   prompts_per_step=4, max_staleness=2, last_step=5)
        for step in range(6):
            _, ledger = await collector.collect(step, 0)
            assert ledger.generated_tokens == ledger.returned_tokens > 0 and ledger.dropped_tokens == 0

    run(check())


def test_resumed_async_draws_the_prompts_that_had_not_been_collected():
    async def check() -> None:
        make = lambda: AheadCollector(responder(ScriptedFleet(limit=LIMIT), CONFIG), Counting(),  # noqa: E731
                                      prompts_per_step=4, max_staleness=2, last_step=9)
        first, second = make(), make()
        for step in range(3):
            await first.collect(step, 0)
        second.load_state_dict(first.state_dict())
        groups, _ = await second.collect(3, 0)
        assert [group.prompt.id for group in groups] == ["12", "13", "14", "15"]

    run(check())


class Problems:
    """A PromptSource of eight problems."""

    domains = frozenset({"math"})

    def __len__(self) -> int:
        return 8

    def prompt(self, index: int) -> Prompt:
        return Prompt(str(index), (0,), str(index), "", "math")


@pytest.mark.parametrize("make", [
    lambda prompts: SyncCollector(responder(ScriptedFleet(limit=LIMIT), CONFIG), prompts, prompts_per_step=3),
    lambda prompts: AheadCollector(responder(ScriptedFleet(limit=LIMIT), CONFIG), prompts, prompts_per_step=3,
                                   max_staleness=2, last_step=9),
    lambda prompts: PartialCollector(responder(ScriptedFleet(limit=LIMIT), CONFIG), prompts, prompts_per_step=6,
                                     budget_tokens=400, slice_tokens=32, retention_steps=50, concurrency=16)],
    ids=["sync", "async", "partial"])
def test_draws_by_pass_rate_go_on_as_if_the_run_had_not_stopped(make):
    """Also while steps, or responses, are under way whose prompts were drawn before the last ones were judged."""
    async def prompts_of(collector, sampler, steps: range) -> list[str]:
        found = []
        for step in steps:
            groups, _ = await collector.collect(step, 0)
            for group in groups:
                sampler.observe(group.prompt, (int(group.prompt.id) + step) % 5 / 4)
            found += [group.prompt.id for group in groups]
        return found

    async def check() -> None:
        samplers = [PassRateSampler(Problems(), 3, PassRateConfig(enabled=True)) for _ in range(3)]
        whole, first, second = map(make, samplers)
        expected = await prompts_of(whole, samplers[0], range(8))
        begun = await prompts_of(first, samplers[1], range(3))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert begun + await prompts_of(second, samplers[2], range(3, 8)) == expected
        assert samplers[2].state_dict() == samplers[0].state_dict()

    run(check())
