"""TIS, IcePop, the mismatch diagnostics, and the plain values they report in."""

from __future__ import annotations

import math

import pytest
import torch

from c3po import (
    Max,
    SumCount,
    geometric_mean_mask,
    icepop_weights,
    kpop_weights,
    masked_sum_count,
    mismatch_diagnostics,
    tis_weights,
    token_veto_mask,
)

# old / rollout = 1/4, 1/2, 1, 3, 5, 6 and one masked place.
RATIOS = torch.tensor([0.25, 0.5, 1.0, 3.0, 5.0, 6.0, 1.0], dtype=torch.float64)
MASK = torch.tensor([True] * 6 + [False])


def old_and_rollout(dtype=torch.float64, masked=0.0):
    rollout = torch.full((7,), -1.0, dtype=torch.float64)
    old = rollout + RATIOS.log()
    old[-1] = masked
    return old.to(dtype), rollout.to(dtype)


def test_golden_tis():
    weights, sums = tis_weights(*old_and_rollout(), MASK, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.5, 1, 2, 2, 2, 0], dtype=torch.float64))
    assert (sums["tis_capped_fraction"].sum.item(), sums["tis_capped_fraction"].count.item()) == (3, 6)
    assert sums["mismatch_weight"].sum.item() == pytest.approx(7.75)
    # 1/16 + 1/4 + 1 + 3 * 4 = 13.3125; effective sample size 7.75^2 / 13.3125 = 4.51 of 6 tokens.
    assert sums["mismatch_weight_squared"].sum.item() == pytest.approx(13.3125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_icepop_keeps_its_borders(dtype):
    # Ratios exactly at 0.5 and 5.0 are inside: alpha <= k <= beta. Built from rollout 0, so nothing rounds.
    old = torch.tensor([math.log(0.25), math.log(0.5), 0.0, math.log(3), math.log(5), math.log(6), 0.0], dtype=dtype)
    weights, sums = icepop_weights(old, torch.zeros(7, dtype=dtype), MASK, low=0.5, high=5.0)
    torch.testing.assert_close(weights, torch.tensor([0, 0.5, 1, 3, 5, 0, 0], dtype=dtype))
    assert (sums["icepop_low_fraction"].sum.item(), sums["icepop_low_fraction"].count.item()) == (1, 6)
    assert (sums["icepop_high_fraction"].sum.item(), sums["icepop_high_fraction"].count.item()) == (1, 6)
    assert sums["mismatch_weight"].sum.item() == pytest.approx(9.5)


def test_golden_mismatch():
    # Ratios 2 and 1/4: k3 = 2 - 1 - ln 2 and 1/4 - 1 + 2 ln 2, together 1/4 + ln 2; |log| = ln 2 and 2 ln 2.
    old = torch.tensor([math.log(2), -math.log(4), 50.0], dtype=torch.float64)
    mask = torch.tensor([True, True, False])
    sums, maxima = mismatch_diagnostics(old, torch.zeros(3, dtype=torch.float64), mask)
    assert (sums["mismatch_kl"].sum.item(), sums["mismatch_kl"].count.item()) == (pytest.approx(0.25 + math.log(2)), 2)
    assert (sums["mismatch_abs"].sum.item(), sums["mismatch_abs"].count.item()) == (pytest.approx(3 * math.log(2)), 2)
    assert maxima["mismatch_abs"].value.item() == pytest.approx(2 * math.log(2))


def test_a_small_mismatch_keeps_its_digits_in_float32():
    # log ratio 1e-3: k3 = 1e-6/2 + 1e-9/6; r - 1 would be rounded to multiples of 1.2e-7.
    sums, _ = mismatch_diagnostics(torch.tensor([1e-3]), torch.zeros(1), torch.ones(1, dtype=torch.bool))
    assert sums["mismatch_kl"].sum.item() == pytest.approx(5.00167e-7, rel=1e-3)


def test_sequence_masks_keep_their_borders_and_are_zero_outside_the_mask():
    # k of two sequences: 1/2, 1/2 and 2, 2, each with one unselected token.
    old = torch.tensor([-1.0, -1.0, 9.0, 1.0, 1.0, 9.0], dtype=torch.float64) * math.log(2)
    mask, ids = torch.tensor([True, True, False] * 2), torch.tensor([0] * 3 + [1] * 3)
    given = (old, torch.zeros(6, dtype=torch.float64), mask, ids)
    assert geometric_mean_mask(*given, low=0.5, high=2.0)[0].tolist() == mask.double().tolist()
    assert token_veto_mask(*given, min_ratio=0.5)[0].tolist() == mask.double().tolist()


@pytest.mark.parametrize("masked", [math.inf, -math.inf, math.nan])
def test_masked_values_do_not_matter(masked):
    ids = torch.zeros(7, dtype=torch.int64)
    functions = [lambda *a: tis_weights(*a, cap=2.0), lambda *a: icepop_weights(*a, low=0.5, high=5.0),
                 lambda *a: kpop_weights(*a, max_kl=0.1), lambda *a: token_veto_mask(*a, ids, min_ratio=0.2),
                 lambda *a: geometric_mean_mask(*a, ids, low=0.5, high=5.0)]
    for function in functions:
        weights, sums = function(*old_and_rollout(masked=masked), MASK)
        clean_weights, clean_sums = function(*old_and_rollout(), MASK)
        assert torch.equal(weights, clean_weights)
        assert all(sums[key].sum == clean_sums[key].sum for key in clean_sums)
    sums, maxima = mismatch_diagnostics(*old_and_rollout(masked=masked), MASK)
    assert maxima["mismatch_abs"].value.item() == pytest.approx(math.log(6))
    assert math.isfinite(sums["mismatch_kl"].sum.item())


def test_far_ratios_do_not_overflow():
    # exp(200) is inf in float32; in log space TIS caps it first and IcePop drops it first.
    old, rollout, mask = torch.tensor([0.0, -200.0]), torch.tensor([-200.0, 0.0]), torch.ones(2, dtype=torch.bool)
    assert tis_weights(old, rollout, mask, cap=2.0)[0].tolist() == pytest.approx([2.0, 0.0])
    assert icepop_weights(old, rollout, mask, low=0.5, high=5.0)[0].tolist() == [0.0, 0.0]


def test_kpop_of_certain_and_of_impossible_tokens():
    # A float32 log-probability of exactly 0 means 1 - p < 2^-24: no gap to 1 - 1e-7, a gap to e^-1 and to e^-200,
    # whichever side says so; nothing becomes NaN.
    old = torch.tensor([0.0, 0.0, -1e-7, 0.0, -200.0, -200.0])
    rollout = torch.tensor([0.0, -1e-7, 0.0, -1.0, 0.0, -200.0])
    weights, sums = kpop_weights(old, rollout, torch.ones(6, dtype=torch.bool), max_kl=0.1)
    assert weights.tolist() == pytest.approx([1, 1, 1, 0, 0, 1])
    assert sums["kpop_fraction"].sum.item() == 2


def test_long_sequences_are_judged_by_the_mean_and_not_by_the_product():
    # 10,000 tokens of old/rollout = 1.01: the product is e^99, the geometric mean 1.01.
    old, ids = torch.full((10_000,), math.log(1.01)), torch.zeros(10_000, dtype=torch.int64)
    given = (old, torch.zeros(10_000), torch.ones(10_000, dtype=torch.bool), ids)
    assert bool(geometric_mean_mask(*given, low=0.9, high=1.011)[0].all())
    assert not bool(geometric_mean_mask(*given, low=0.9, high=1.009)[0].any())


@pytest.mark.parametrize("weigh", [
    lambda *a: tis_weights(*a, cap=2.0), lambda *a: icepop_weights(*a, low=0.5, high=5.0),
    lambda *a: kpop_weights(*a, max_kl=0.1),
    lambda *a: geometric_mean_mask(*a, torch.zeros(7, dtype=torch.int64), low=0.5, high=5.0),
    lambda *a: token_veto_mask(*a, torch.zeros(7, dtype=torch.int64), min_ratio=0.1)])
def test_weights_carry_no_gradient_and_are_float32_for_half_precision(weigh):
    old, rollout = old_and_rollout(dtype=torch.bfloat16)
    weights, sums = weigh(old.requires_grad_(), rollout, MASK)
    assert not weights.requires_grad and weights.dtype == torch.float32
    assert not any(value.sum.requires_grad for value in sums.values())


def test_diagnostics_carry_no_gradient():
    old, rollout = old_and_rollout()
    sums, maxima = mismatch_diagnostics(old.requires_grad_(), rollout, MASK)
    assert not any(value.sum.requires_grad for value in sums.values())
    assert not maxima["mismatch_abs"].value.requires_grad


def test_no_token_gives_zero_counts():
    empty = torch.zeros(0)
    sums, maxima = mismatch_diagnostics(empty, empty, torch.zeros(0, dtype=torch.bool))
    assert (sums["mismatch_kl"].sum.item(), sums["mismatch_kl"].count.item()) == (0, 0)
    assert maxima["mismatch_abs"].value.item() == 0


@pytest.mark.parametrize(("call", "message"), [
    (lambda x, m: tis_weights(x, x, m, cap=0.0), "cap=0.0"),
    (lambda x, m: icepop_weights(x, x, m, low=0.0, high=5.0), "low=0.0"),
    (lambda x, m: icepop_weights(x, x, m, low=5.0, high=0.5), "low=5.0"),
    (lambda x, m: tis_weights(x, x[:2], m, cap=2.0), "one shape"),
    (lambda x, m: mismatch_diagnostics(x, x, m.float()), "bool"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3), torch.ones(3, dtype=torch.bool))


def test_sum_counts_add_and_maxima_merge():
    assert SumCount(1.0, 2) + SumCount(3.0, 4) == SumCount(4.0, 6)
    assert Max(1.0).merge(Max(3.0)) == Max(3.0) == Max(3.0).merge(Max(1.0))
    # Even a NaN is not lost: a maximum over slices must show it whichever side it is on.
    assert math.isnan(Max(1.0).merge(Max(math.nan)).value) and math.isnan(Max(math.nan).merge(Max(1.0)).value)
    one, three, nan = (Max(torch.tensor(value)) for value in (1.0, 3.0, math.nan))
    assert one.merge(three).value == three.merge(one).value == 3
    assert torch.isnan(one.merge(nan).value) and torch.isnan(nan.merge(one).value)


def test_counts_stay_exact_beyond_float32():
    # 2^24 + 1 is not a float32; a step of the paper has 10^8 tokens.
    one = masked_sum_count(torch.ones(1), torch.ones(1, dtype=torch.bool))
    many = SumCount(one.sum * 2 ** 24, one.count * 2 ** 24) + one
    assert (many.sum.item(), many.count.item()) == (2 ** 24 + 1, 2 ** 24 + 1)
