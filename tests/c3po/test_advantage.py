"""group_advantages: values worked by hand, and what equal rewards and odd input give."""

from __future__ import annotations

import pytest
import torch

from c3po import group_advantages


def test_golden_std():
    # Rewards 1,0,0,0: mean 1/4, population variance 3/16, std sqrt(3)/4. (3/4)/std = sqrt(3), (-1/4)/std = -1/sqrt(3).
    actual = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64), eps=1e-300)
    root = 3 ** 0.5
    torch.testing.assert_close(actual, torch.tensor([[root, -1 / root, -1 / root, -1 / root]], dtype=torch.float64))


def test_golden_no_scale_and_groups_do_not_mix():
    # Means 1/2 and 2; Dr. GRPO only subtracts them.
    actual = group_advantages(torch.tensor([[1.0, 0.0], [5.0, -1.0]]), scale="none")
    assert actual.tolist() == [[0.5, -0.5], [3.0, -3.0]]


def test_a_response_without_a_reward_takes_no_part():
    # Means 1/2 over the two judged of the first group; the second has one judged, the third none.
    rewards = torch.tensor([[1.0, float("nan"), 0.0], [7.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    judged = torch.tensor([[True, False, True], [True, False, False], [False] * 3])
    actual = group_advantages(rewards, judged_PK=judged, scale="none")
    assert actual.tolist() == [[0.5, 0.0, -0.5], [0.0] * 3, [0.0] * 3]
    whole = rewards[2:]
    assert torch.equal(group_advantages(whole, judged_PK=torch.ones(1, 3, dtype=torch.bool)), group_advantages(whole))


def test_eps_is_added_to_the_std():
    # Rewards 1,0: deviation 1/2, std 1/2; with eps 1/2 the advantage is (1/2) / 1.
    assert group_advantages(torch.tensor([[1.0, 0.0]]), eps=0.5).tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e7 + 1 / 3])
def test_equal_rewards_give_exactly_zero(scale, reward):
    rewards_PK = torch.full((1, 11), reward)
    assert group_advantages(rewards_PK, scale=scale, eps=1e-30).tolist() == [[0.0] * 11]


def test_the_mean_of_equal_rewards_is_really_rounded():
    # The case above would prove nothing if every mean came out exact.
    rewards = torch.full((11,), 0.1)
    assert bool((rewards - rewards.mean() != 0).any())


def test_shift_does_not_matter_and_positive_scale_neither():
    rewards_PK = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = group_advantages(rewards_PK, eps=1e-12)
    torch.testing.assert_close(group_advantages(3 * rewards_PK + 7, eps=1e-12), expected)


def test_integer_rewards_become_float32_and_float64_stays():
    assert group_advantages(torch.tensor([[1, 0]])).dtype == torch.float32
    assert group_advantages(torch.tensor([[1.0, 0.0]], dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(("rewards_PK", "options", "message"), [
    (torch.zeros(4), {}, "prompts, responses"),
    (torch.tensor([[1.0, float("nan")]]), {}, "not finite"),
    (torch.zeros(1, 2), {"scale": "max"}, "scale='max'"),
    (torch.zeros(1, 2), {"eps": 0.0}, "eps=0.0"),
    (torch.zeros(1, 2), {"judged_PK": torch.ones(1, 2)}, r"judged_PK must be bool \(1, 2\)"),
    (torch.zeros(1, 2), {"judged_PK": torch.ones(2, dtype=torch.bool)}, r"judged_PK must be bool \(1, 2\)"),
])
def test_bad_input_is_named(rewards_PK, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards_PK, **options)
