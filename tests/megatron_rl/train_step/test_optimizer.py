"""The learning rate of a step, by hand."""

from __future__ import annotations

import pytest

from megatron_rl.config.schema import OptimizerConfig
from megatron_rl.train_step.optimizer import learning_rate


def rates(total: int, **options) -> list[float]:
    return [learning_rate(step, total, OptimizerConfig(**options)) for step in range(total)]


def test_constant():
    assert rates(3, lr=2.0) == [2.0, 2.0, 2.0]


def test_warmup_is_linear_and_the_first_step_is_not_wasted():
    # 4 steps of warm-up: 1/4, 2/4, 3/4, 4/4, then constant
    assert rates(6, lr=8.0, warmup_steps=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_warmup_fraction_counts_total_steps():
    # 0.3 * 10 = 3 steps
    assert rates(10, lr=3.0, warmup_fraction=0.3)[:4] == [1.0, 2.0, 3.0, 3.0]


def test_tiny_warmup_fraction_still_warms_for_one_step():
    assert rates(4, lr=3.0, warmup_fraction=0.01) == [3.0] * 4


def test_cosine_falls_from_lr_to_its_floor():
    # warm-up 2, then 4 steps of progress 0, 1/4, 2/4, 3/4; floor 0.2
    # cos(0) = 1, cos(pi/4) = 0.7071068, cos(pi/2) = 0, cos(3 pi/4) = -0.7071068; rate 10 * (0.2 + 0.8 * (1 + cos) / 2)
    expected = [5.0, 10.0, 10.0, 2 + 4 * 1.7071068, 6.0, 2 + 4 * 0.2928932]
    assert rates(6, lr=10.0, schedule="cosine", warmup_steps=2, min_lr_ratio=0.2) == pytest.approx(expected)


def test_cosine_stays_at_its_floor_after_the_last_step():
    options = OptimizerConfig(lr=10.0, schedule="cosine", min_lr_ratio=0.2)
    assert learning_rate(6, 6, options) == learning_rate(60, 6, options) == pytest.approx(2.0)


def test_warmup_as_long_as_the_run_does_not_divide_by_zero():
    options = OptimizerConfig(lr=10.0, schedule="cosine", warmup_steps=4)
    assert [learning_rate(step, 4, options) for step in range(5)] == pytest.approx([2.5, 5.0, 7.5, 10.0, 10.0])
