"""Exactly Phi response tokens enter each optimiser step, with advantages of whole groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_rl.batch import BudgetFill, FillCount, assemble
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.types import FAILURES, Finish, Prompt, Rollout, RolloutGroup, Score


def rollout(prompt_tokens: int, response_tokens: int, *, finish: Finish = Finish.STOP, first: int = 0) -> Rollout:
    """Token ids count up from `first`, so that a cut sequence can be recognised."""
    length = prompt_tokens + response_tokens
    trainable = np.arange(length) >= prompt_tokens
    return Rollout(np.arange(first, first + length, dtype=np.int32), trainable,
                   np.where(trainable, -np.arange(length) / 10, 0).astype(np.float32), finish, (),
                   routed_experts=(np.arange(first, first + length - 1) % 256).astype(np.uint8)[:, None, None])


def group(responses: list[Rollout], rewards: list[float]) -> RolloutGroup:
    prompt = Prompt("id", (1, 2), "text", "answer", "math")
    return RolloutGroup(prompt, tuple(responses), ("",) * len(responses),
                        tuple(Score(value, "correct" if value > 0 else "wrong") for value in rewards))


def random_groups(seed: int, num_prompts: int = 6, num_responses: int = 4) -> list[RolloutGroup]:
    rng = np.random.default_rng(seed)

    def response() -> Rollout:
        return rollout(int(rng.integers(1, 6)), int(np.ceil(5 * rng.pareto(1.3) + 1)))

    return [group([response() for _ in range(num_responses)], rng.normal(size=num_responses).tolist())
            for _ in range(num_prompts)]


def available(groups) -> int:
    return sum(r.response_tokens for g in groups for r in g.rollouts)


def flat(groups) -> list[Rollout]:
    return [r for g in groups for r in g.rollouts]


def run(groups, algo: AlgoConfig, *, dp: int = 1, seed: int = 0, step: int = 0, max_response_tokens: int = 10_000):
    return assemble(groups, algo, dp=dp, seed=seed, step=step, max_response_tokens=max_response_tokens)


@pytest.mark.parametrize("seed", range(40))
def test_exactly_phi_tokens_are_kept(seed):
    groups = random_groups(seed)
    total = available(groups)
    for phi in {1, total // 3 + 1, total - 1, total}:
        [batch] = run(groups, AlgoConfig(phi=phi), seed=seed)
        kept = sum(int(sample.loss_mask.sum()) for sample in batch.samples)
        assert kept == batch.selection.selected_tokens == phi
        assert batch.available_tokens == total
        assert batch.num_responses == len(flat(groups))


@pytest.mark.parametrize("seed", range(20))
def test_kept_sequences_are_the_rollouts_up_to_their_last_kept_token(seed):
    groups = random_groups(seed)
    [batch] = run(groups, AlgoConfig(phi=available(groups) // 2), seed=seed)
    cut = 0
    assert batch.samples
    for sample in batch.samples:
        whole = flat(groups)[sample.index]
        end = len(sample.token_ids)
        np.testing.assert_array_equal(sample.token_ids, whole.token_ids[:end])
        np.testing.assert_array_equal(sample.loss_mask, whole.trainable[:end])
        np.testing.assert_array_equal(sample.rollout_logprobs, whole.rollout_logprobs[:end])
        np.testing.assert_array_equal(sample.routed_experts[:, 0, 0], sample.token_ids[:-1] % 256)
        assert sample.loss_mask[-1], "what follows the last kept token is not sent to the trainer"
        assert sample.num_response_tokens == whole.response_tokens, "|y_i| is the length before the cut"
        cut += end < len(whole.token_ids)
    assert cut <= 1, "only the response that reaches Phi is cut"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("updates", [2, 3])
def test_each_update_of_a_rollout_gets_phi_of_its_own_responses(seed, updates):
    groups = random_groups(seed, num_prompts=9)
    algo = AlgoConfig(phi=6, updates_per_rollout=updates)
    batches = run(groups, algo, seed=seed)
    assert len(batches) == updates
    assert [batch.selection.selected_tokens for batch in batches] == [6] * updates
    used = [sample.index for batch in batches for sample in batch.samples]
    assert len(used) == len(set(used)), "a response trains once per rollout"
    assert sum(batch.num_responses for batch in batches) == len(flat(groups))
    assert sum(batch.available_tokens for batch in batches) == available(groups)


def test_budget_of_a_rollout():
    """phi * updates, times the data-parallel ranks only under scope per_dp_rank."""
    assert BudgetFill(AlgoConfig(phi=10, updates_per_rollout=3), 4, 80).tokens == 30
    assert BudgetFill(AlgoConfig(phi=10, updates_per_rollout=3, scope="per_dp_rank"), 4, 80).tokens == 120


def test_scope_per_dp_rank_multiplies_phi():
    groups = random_groups(0)
    [batch] = run(groups, AlgoConfig(phi=7, scope="per_dp_rank"), dp=3)
    assert batch.selection.selected_tokens == batch.selection.phi == 21


def test_advantages_come_from_whole_groups():
    """Rewards 1, 0, 0, 0: mean 1/4, deviation sqrt(3)/4, so sqrt(3) and three times -1/sqrt(3), whatever is kept."""
    groups = [group([rollout(1, 5) for _ in range(4)], [1.0, 0.0, 0.0, 0.0])]
    by_index = {0: 3 ** 0.5, 1: -(3 ** -0.5), 2: -(3 ** -0.5), 3: -(3 ** -0.5)}
    for step in range(8):
        [batch] = run(groups, AlgoConfig(phi=6), step=step)  # one response whole and one token of another
        assert len(batch.samples) == 2
        for sample in batch.samples:
            assert sample.advantage == pytest.approx(by_index[sample.index], abs=1e-4)


def test_two_groups_do_not_mix_their_rewards():
    groups = [group([rollout(1, 2), rollout(1, 2)], [1.0, 0.0]), group([rollout(1, 2), rollout(1, 2)], [9.0, 5.0])]
    [batch] = run(groups, AlgoConfig(phi=8, advantage_scale="none"))
    assert {sample.index: sample.advantage for sample in batch.samples} == {0: 0.5, 1: -0.5, 2: 2.0, 3: -2.0}


def test_order_is_a_function_of_seed_and_step():
    groups = random_groups(1)
    algo = AlgoConfig(phi=available(groups) // 3)

    def chosen(**where):
        return tuple(sample.index for sample in run(groups, algo, **where)[0].samples)

    assert chosen(seed=1, step=2) == chosen(seed=1, step=2)
    assert len({chosen(seed=1, step=step) for step in range(6)}) > 1
    assert len({chosen(seed=seed, step=0) for seed in range(6)}) > 1


def test_cutoff_response_keeps_the_last_response_whole():
    groups = [group([rollout(1, 5) for _ in range(4)], [1.0, 0.0, 0.0, 0.0])]
    [batch] = run(groups, AlgoConfig(phi=6, cutoff="response"))
    assert [int(sample.loss_mask.sum()) for sample in batch.samples] == [5, 5]
    assert batch.selection.phi == 6


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "token_mean"])
def test_without_a_budget_every_token_is_kept(objective):
    groups = random_groups(2)
    [batch] = run(groups, AlgoConfig(objective=objective, phi=3))
    assert batch.selection.selected_tokens == available(groups)
    assert sorted(sample.index for sample in batch.samples) == list(range(len(flat(groups))))
    for sample in batch.samples:
        np.testing.assert_array_equal(sample.token_ids, flat(groups)[sample.index].token_ids)


TRUNCATED = [rollout(1, 4), rollout(1, 10, finish=Finish.LENGTH)]


def test_truncated_responses_train_like_others_by_default():
    [batch] = run([group(TRUNCATED, [1.0, 0.0])], AlgoConfig(phi=14))
    assert batch.selection.selected_tokens == 14


def test_masked_truncated_responses_carry_no_loss_but_count_in_the_group():
    [batch] = run([group(TRUNCATED, [1.0, 0.0])], AlgoConfig(phi=4, truncated="mask", advantage_scale="none"))
    assert [sample.index for sample in batch.samples] == [0]
    assert batch.available_tokens == batch.selection.selected_tokens == 4
    assert batch.samples[0].advantage == 0.5  # against a mean that the masked response is part of


def test_overlong_penalty_lowers_the_reward_before_the_advantage():
    """Limit 10, buffer 4: none up to 6 tokens, -1 at 10. Rewards 1, 1 become 1, 0, advantages 0.5, -0.5."""
    algo = AlgoConfig(phi=14, truncated="overlong_penalty", overlong_buffer_tokens=4, advantage_scale="none")
    [batch] = run([group(TRUNCATED, [1.0, 1.0])], algo, max_response_tokens=10)
    assert {sample.index: sample.advantage for sample in batch.samples} == {0: 0.5, 1: -0.5}


def test_underfull_step_is_an_error_that_names_the_keys_only_when_asked():
    groups = [group([rollout(1, 5), rollout(1, 5)], [1.0, 0.0])]
    with pytest.raises(ValueError, match=r"step 3: 10 response tokens for algo.phi=11; raise "
                                         r"rollout.prompts_per_step or set algo.underfull=collect_more"):
        run(groups, AlgoConfig(phi=11, underfull="error"), step=3)
    [batch] = run(groups, AlgoConfig(phi=11, underfull="train_short"))
    assert (batch.selection.selected_tokens, batch.selection.phi) == (10, 11)
    assert run(groups, AlgoConfig(phi=10, underfull="error"))[0].selection.selected_tokens == 10


def test_without_a_budget_no_step_is_underfull():
    groups = [group([rollout(1, 5), rollout(1, 5)], [1.0, 0.0])]
    assert run(groups, AlgoConfig(objective="grpo", phi=11, underfull="error"))[0].selection.selected_tokens == 10


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_groups_needed_are_the_fewest_that_fill_every_step(seed, updates):
    groups = random_groups(seed, num_prompts=9)
    first = [r.response_tokens for r in groups[0].rollouts]
    for phi in (1, first[0], sum(first) // updates, 40, 10 ** 6):  # also at the end of a response
        algo = AlgoConfig(phi=max(1, phi), updates_per_rollout=updates, order="groups")
        fewest = next((count for count in range(1, len(groups) + 1) if all(
            batch.selection.selected_tokens == algo.phi for batch in run(groups[:count], algo))), None)
        assert filled(groups, algo).needed() == fewest


def filled(groups: list[RolloutGroup], algo: AlgoConfig, seed: int = 0) -> FillCount:
    """All responses judged, in an order of chance; `needed` never grows on the way."""
    count = BudgetFill(algo, 1, 10_000).count(len(groups[0].rollouts))
    places = [(place, sample) for place in [count.open() for _ in groups] for sample in range(len(groups[0].rollouts))]
    seen = []
    for at in np.random.default_rng(seed).permutation(len(places)):
        place, sample = places[at]
        count.judged(place, sample, groups[place].rollouts[sample], groups[place].scores[sample])
        seen.append(count.needed())
    known = [needed for needed in seen if needed is not None]
    assert known == sorted(known, reverse=True)
    return count


@pytest.mark.parametrize("algo", [
    AlgoConfig(phi=40, order="groups"), AlgoConfig(phi=40, order="groups", dynamic_sampling=True),
    AlgoConfig(phi=20, order="groups", updates_per_rollout=2, truncated="mask")],
    ids=["plain", "dynamic_sampling", "two_updates_masked"])
@pytest.mark.parametrize("seed", range(5))
def test_the_count_agrees_with_the_cut(seed, algo):
    """Also with failed responses among them."""
    groups = [replace(group, scores=tuple(
        Score(0.0, FAILURES[place % 3]) if (place + sample) % 4 == 0 else score
        for sample, score in enumerate(group.scores)))
        for place, group in enumerate(random_groups(seed, num_prompts=12))]
    count = filled(groups, algo, seed)
    fill = BudgetFill(algo, 1, 10_000)
    offered = [fill.usable_tokens(group.rollouts, group.scores) for group in groups]
    assert count.total == sum(map(sum, offered)) == sum(batch.available_tokens for batch in run(groups, algo))
    assert count.mean_offered(2, 5) == np.mean(offered[2:5])
    assert count.needed() is not None
    few, many = run(groups[:count.needed()], algo), run(groups, algo)
    assert [[s.index for s in batch.samples] for batch in few] == [[s.index for s in batch.samples] for batch in many]


@pytest.mark.parametrize("status", FAILURES)
def test_a_failed_response_trains_nothing_and_moves_no_advantage(status):
    """Rewards 1, 0 and a failure: the mean is 1/2 over the two that were judged, whatever the failure's value."""
    failed = replace(rollout(1, 5), finish=Finish.ERROR)
    three = group([rollout(1, 4), failed, rollout(1, 4)], [1.0, 0.0, 0.0])
    three = replace(three, scores=(three.scores[0], Score(float("nan"), status), three.scores[2]))
    [batch] = run([three], AlgoConfig(phi=8, advantage_scale="none"))
    assert {sample.index: sample.advantage for sample in batch.samples} == {0: 0.5, 2: -0.5}
    assert (batch.available_tokens, batch.num_responses) == (8, 2)


def test_a_group_that_failed_whole_offers_nothing():
    lost = group([rollout(1, 4), rollout(1, 4)], [0.0, 0.0])
    lost = replace(lost, scores=(Score(0.0, "engine_error"),) * 2)
    good = group([rollout(1, 4), rollout(1, 4)], [1.0, 0.0])
    for dynamic in (False, True):
        [batch] = run([lost, good], AlgoConfig(phi=8, dynamic_sampling=dynamic))
        assert sorted(sample.index for sample in batch.samples) == [2, 3] and batch.num_responses == 2


def test_empty_responses_are_left_out():
    groups = [group([rollout(2, 0), rollout(2, 3)], [0.0, 1.0])]
    [batch] = run(groups, AlgoConfig(phi=3))
    assert [sample.index for sample in batch.samples] == [1]


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_sampling_leaves_out_groups_that_are_not_mixed_before_the_cut(seed):
    mixed = [group(list(g.rollouts), [1.0, 0.0, 0.0, 1.0]) for g in random_groups(seed, num_prompts=3)]
    equal = [group(list(g.rollouts), [1.0] * 4) for g in random_groups(seed + 100, num_prompts=3)]
    groups = [equal[0], mixed[0], mixed[1], equal[1], mixed[2], equal[2]]
    phi = available(mixed) - 1
    [batch] = run(groups, AlgoConfig(phi=phi, dynamic_sampling=True), seed=seed)
    assert batch.available_tokens == phi + 1
    assert batch.selection.selected_tokens == phi
    assert batch.num_responses == 12, "responses of equal groups are not drawn from"
    assert {sample.index // 4 for sample in batch.samples} == {1, 2, 4}
    assert all(sample.advantage != 0 for sample in batch.samples)


@pytest.mark.parametrize("seed", range(10))
def test_a_response_of_several_sequences_is_one_response_of_the_budget(seed):
    """Every second response has two sequences more. Phi counts the tokens of all, the cut goes through them in order,
    and advantage, |y_i| and the number of responses are those of the whole response."""
    groups = [replace(each, rollouts=tuple(
        replace(first, others=(rollout(3, 2, first=1000), rollout(2, 4, first=2000))) if sample % 2 else first
        for sample, first in enumerate(each.rollouts))) for each in random_groups(seed)]
    total, responses = available(groups), flat(groups)
    assert total == available(random_groups(seed)) + 12 * 6
    for phi in (1, total // 2, total // 2 + 3, total):
        [batch] = run(groups, AlgoConfig(phi=phi), seed=seed)
        assert sum(int(sample.loss_mask.sum()) for sample in batch.samples) == batch.selection.selected_tokens == phi
        assert batch.num_responses == len(responses) and batch.available_tokens == total
        of: dict[int, list] = {}
        for sample in batch.samples:
            of.setdefault(sample.index, []).append(sample)
            assert sample.num_response_tokens == responses[sample.index].response_tokens
        for index, samples in of.items():
            whole = responses[index].sequences[:len(samples)]
            assert len({sample.advantage for sample in samples}) == 1
            for sample, sequence in zip(samples, whole, strict=True):
                end = len(sample.token_ids)
                assert sample.token_ids.tolist() == sequence.token_ids[:end].tolist()
                assert sample.routed_experts.tolist() == sequence.routed_experts[:end - 1].tolist()
                assert sample is samples[-1] or end == len(sequence.token_ids), "only the last is cut"
    assert sorted(map(len, of.values())) == [1] * 12 + [3] * 12, "with all of Phi, all sequences train"
