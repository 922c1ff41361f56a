"""select_within_budget and selection_order: worked examples, then properties over generated steps."""

from __future__ import annotations

import random

import pytest
import torch

from c3po import select_within_budget, selection_order

LENGTHS = torch.tensor([5, 3, 0, 4, 2])
ORDER = torch.tensor([3, 2, 0, 4, 1])  # lengths in this order: 4, 0, 5, 2, 3


@pytest.mark.parametrize(("phi", "cutoff", "kept"), [
    (6, "token", [2, 0, 0, 4, 0]),      # 4, then 2 of the 5
    (6, "response", [5, 0, 0, 4, 0]),   # 4, then the 5 whole: 9
    (9, "token", [5, 0, 0, 4, 0]),      # 4 + 5 hits 9: nothing further
    (9, "response", [5, 0, 0, 4, 0]),
    (10, "token", [5, 0, 0, 4, 1]),
    (10, "response", [5, 0, 0, 4, 2]),
    (1, "token", [0, 0, 0, 1, 0]),
    (14, "token", [5, 3, 0, 4, 2]),     # all 14 tokens
    (99, "token", [5, 3, 0, 4, 2]),     # too few: all
    (99, "response", [5, 3, 0, 4, 2]),
])
def test_golden(phi, cutoff, kept):
    selection = select_within_budget(LENGTHS, ORDER, phi=phi, cutoff=cutoff)
    assert selection.kept_tokens_N.tolist() == kept
    assert (selection.selected_tokens, selection.phi) == (sum(kept), phi)
    assert selection.kept_tokens_N.dtype == torch.int64


def test_token_is_the_default_cutoff():
    assert select_within_budget(LENGTHS, ORDER, phi=6).selected_tokens == 6


@pytest.mark.parametrize("cutoff", ["token", "response"])
def test_exact_hit_takes_no_further_response(cutoff):
    selection = select_within_budget(torch.tensor([2, 2, 2]), torch.arange(3), phi=4, cutoff=cutoff)
    assert selection.kept_tokens_N.tolist() == [2, 2, 0]


def greedy(lengths, order, phi, cutoff):
    """Eq. 3 as a person would do it."""
    kept, total = [0] * len(lengths), 0
    for index in order:
        if total >= phi:
            break
        kept[index] = min(lengths[index], phi - total) if cutoff == "token" else lengths[index]
        total += kept[index]
    return kept


@pytest.mark.parametrize("cutoff", ["token", "response"])
@pytest.mark.parametrize("seed", range(60))
def test_equals_the_greedy_walk(seed, cutoff):
    generator = random.Random(seed)
    lengths = [generator.choice((0, generator.randint(0, 40))) for _ in range(generator.randint(0, 24))]
    # budgets below, about and above the total, and often at the end of a response
    phi = max(1, generator.choice((generator.randint(1, 300), sum(lengths[:3]), sum(lengths))))
    order = list(range(len(lengths)))
    generator.shuffle(order)
    lengths_N, order_N = torch.tensor(lengths, dtype=torch.int64), torch.tensor(order, dtype=torch.int64)
    selection = select_within_budget(lengths_N, order_N, phi=phi, cutoff=cutoff)
    assert selection.kept_tokens_N.tolist() == greedy(lengths, order, phi, cutoff)
    assert selection.selected_tokens == int(selection.kept_tokens_N.sum())
    if cutoff == "token":
        assert selection.selected_tokens == min(phi, sum(lengths))
        assert sum(0 < k < n for k, n in zip(selection.kept_tokens_N.tolist(), lengths, strict=True)) <= 1


def test_totals_beyond_32_bits_of_tokens():
    lengths_N = torch.full((3,), 2 ** 31 - 1, dtype=torch.int32)
    selection = select_within_budget(lengths_N, torch.arange(3), phi=2 ** 32)
    assert selection.selected_tokens == 2 ** 32


@pytest.mark.parametrize(("lengths", "order", "options", "message"), [
    ([1, 2], [0, 0], {"phi": 1}, "permutation of range\\(2\\)"),
    ([1, 2], [0, 2], {"phi": 1}, "permutation of range\\(2\\)"),
    ([1, 2], [0], {"phi": 1}, "permutation of range\\(2\\)"),
    ([1, -2], [0, 1], {"phi": 1}, "negative length"),
    ([1.0, 2.0], [0, 1], {"phi": 1}, "response_lengths_N"),
    ([True, False], [0, 1], {"phi": 1}, "response_lengths_N"),
    ([1, 2], [0, 1], {"phi": 0}, "phi=0"),
    ([1, 2], [0, 1], {"phi": 1, "cutoff": "group"}, "cutoff='group'"),
])
def test_bad_input_is_named(lengths, order, options, message):
    with pytest.raises(ValueError, match=message):
        select_within_budget(torch.tensor(lengths), torch.tensor(order), **options)


def test_order_is_a_permutation_fixed_by_seed_and_step():
    order_N = selection_order(64, seed=5, step=9)
    assert order_N.dtype == torch.int64
    assert sorted(order_N.tolist()) == list(range(64))
    torch.manual_seed(123)  # the global generator has no say
    assert torch.equal(order_N, selection_order(64, seed=5, step=9))


def test_order_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    selection_order(8, seed=0, step=0)
    assert torch.equal(before, torch.get_rng_state())


def test_orders_of_other_steps_and_seeds_differ():
    # Also (seed + 1, step - 1) and seeds that agree in their low 32 bits, which torch's generator would merge.
    pairs = [(0, 0), (0, 1), (1, 0), (2, 3), (3, 2), (2 ** 32, 0), (11, 1), (1, 11)]
    orders = {tuple(selection_order(64, seed=seed, step=step).tolist()) for seed, step in pairs}
    assert len(orders) == len(pairs)
    assert len({tuple(selection_order(64, seed=0, step=step).tolist()) for step in range(600)}) == 600


def test_every_response_is_equally_likely_to_come_first():
    # 4000 steps, 8 responses: 500 each, standard deviation sqrt(4000 * 1/8 * 7/8) = 21; 6 of them is 126.
    first = torch.stack([selection_order(8, seed=1, step=step)[0] for step in range(4000)])
    assert int((first.bincount(minlength=8) - 500).abs().max()) < 126
