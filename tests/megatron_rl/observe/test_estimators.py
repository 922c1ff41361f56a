"""pass@k is the published estimator; maj@k is what drawing and voting gives."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from megatron_rl.observe.estimators import majority_at_k, pass_at_k, sample_counts


def published(n, c, k):
    """Fig. 3 of arXiv 2107.03374: the numerically stable form of the same estimator."""
    return 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))


def test_pass_at_k_is_the_published_estimator_and_the_count_of_all_draws():
    for n in (1, 2, 5, 8, 200):
        for c in range(0, n + 1, max(1, n // 7)):
            for k in {1, 2, n // 2, n} & set(range(1, n + 1)):
                assert pass_at_k(n, c, k) == pytest.approx(published(n, c, k), abs=1e-12), (n, c, k)
    draws = list(combinations([1, 1, 0, 0, 0, 0], 3))
    assert pass_at_k(6, 2, 3) == pytest.approx(float(Fraction(sum(map(any, draws)), len(draws))))
    assert pass_at_k(32, 8, 1) == 0.25  # pass@1 is the mean


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_impossible_numbers_are_refused(n, c, k):
    with pytest.raises(ValueError, match="must hold"):
        pass_at_k(n, c, k)


def test_a_majority_shares_ties_and_ignores_missing_answers():
    assert majority_at_k(["r", "r", "x"], 3, right="r") == 1.0
    assert majority_at_k(["r", "x", None, None], 4, right="r") == 0.5
    assert majority_at_k([None, None], 2, right="r") == 0.0
    assert majority_at_k(["r", "x", "x"], 3, right="r") == 0.0


def test_a_vote_of_fewer_samples_is_the_mean_over_draws():
    votes = ["r"] * 4 + ["x"] * 3 + ["y", None]
    wins = []
    for drawn in combinations(votes, 3):
        counts = {answer: drawn.count(answer) for answer in set(drawn) - {None}}
        best = [answer for answer, count in counts.items() if count == max(counts.values())]
        wins.append(("r" in best) / len(best))
    assert majority_at_k(votes, 3, right="r") == pytest.approx(np.mean(wins), abs=0.1)


def test_k_grows_by_doubling_to_all_samples():
    assert sample_counts(1) == [1] and sample_counts(12) == [1, 2, 4, 8, 12] and sample_counts(32)[-1] == 32
