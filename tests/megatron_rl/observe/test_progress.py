"""Progress display: informative on a terminal, sparse elsewhere."""

import io

import pytest
from rich.console import Console

from megatron_rl.observe.progress import RunProgress, duration


def plain_lines(steps: int, metrics: dict[str, float], **options) -> list[str]:
    file = io.StringIO()
    with RunProgress(steps, "RL", options.pop("enabled", True), console=Console(file=file), **options) as progress:
        for step in range(1, steps + 1):
            progress.update(step, metrics)
    return file.getvalue().splitlines()


def test_away_from_a_terminal_a_fast_run_prints_its_first_and_last_step_only():
    lines = plain_lines(1000, {"reward/mean": 0.5, "tokens_per_s/rollout": 3200.0}, plain_interval_s=600.0)
    assert len(lines) == 2
    assert lines[0].startswith("RL 1/1000  reward 0.500  generated tok/s 3,200") and lines[0].endswith("left")
    assert lines[1].startswith("RL 1000/1000") and "took" in lines[1]


def test_a_slow_run_prints_each_step():
    assert len(plain_lines(5, {"train/loss": 1.25}, plain_interval_s=0.0)) == 5


def test_disabled_prints_nothing():
    assert plain_lines(5, {"train/loss": 1.25}, enabled=False) == []


def test_terminal_shows_the_last_known_accuracy():
    file = io.StringIO()
    with RunProgress(4, "RL", True, console=Console(file=file, force_terminal=True, width=140)) as progress:
        progress.update(1, {"reward/mean": 0.25, "eval/accuracy": 0.75})
        progress.update(2, {"reward/mean": 0.5})
    assert "2/4" in file.getvalue()
    assert "reward 0.500  accuracy 0.750" in file.getvalue()


def test_loss_is_shown_for_sft_and_not_beside_a_reward():
    progress = RunProgress(4, "SFT", False)
    progress.update(1, {"train/loss": 1.25})
    assert progress.status(1).startswith("loss 1.2500")
    progress.update(2, {"train/loss": 0.0, "reward/mean": 0.5})
    assert "loss" not in progress.status(2)


def test_time_left_of_a_resumed_run_counts_only_its_own_steps():
    progress = RunProgress(100, "RL", False, first_step=90)
    progress._started -= 50.0  # five steps took 50 s: five more take 50 s
    assert progress.status(95) == "50 s left"


@pytest.mark.parametrize("seconds, shown", [(47.6, "48 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"),
                                            (7500, "2 h 05 min")])
def test_duration(seconds, shown):
    assert duration(seconds) == shown
