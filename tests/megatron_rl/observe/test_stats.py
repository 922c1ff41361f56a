"""The bootstrap interval resamples problems."""

import numpy as np
import pytest

from megatron_rl.observe.stats import bootstrap_interval


def test_more_copies_of_each_sample_do_not_narrow_the_interval():
    values = [[1.0], [0.0], [0.0], [1.0], [1.0]]
    assert bootstrap_interval([row * 16 for row in values], 500, 3) == bootstrap_interval(values, 500, 3)


def test_interval_is_a_point_when_problems_agree():
    assert bootstrap_interval([[1.0, 0.0]] * 20, 100, 0) == (0.5, 0.5, 0.5)


def test_mean_weighs_samples():
    assert bootstrap_interval([[1.0], [0.0, 0.0, 0.0]], 10, 0)[0] == 0.25


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        solve_rates = generator.beta(1.0, 1.5, size=120)  # true accuracy 1 / 2.5
        samples = (generator.random((120, 2)) < solve_rates[:, None]).astype(float)
        _, low, high = bootstrap_interval(samples, 300, trial)
        covered += low <= 0.4 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_empty_problem_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap_interval([[1.0], []], 10, 0)
