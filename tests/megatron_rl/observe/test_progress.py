"""Progress display: what matters most stays at every width; sparse away from a terminal."""

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_rl.launch.local import JsonlTail
from megatron_rl.observe import progress as progress_module
from megatron_rl.observe.progress import RunProgress, duration
from megatron_rl.observe.timing import PhaseFile, Timers

RL = {"reward/mean": 0.648, "eval/accuracy": 0.75, "budget/fill": 1.0, "tokens_per_s/rollout": 2345.6,
      "tokens_per_s/train": 1900.0, "time/generate": 4.0, "time/train": 2.0, "time/step": 4.7}


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch):
    """The display sees no time pass: 54 steps of 5 s are 4 min 30 s, and 54 of 5.01 s are a second more."""
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: 1000.0))


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


def test_no_step_is_printed_twice_and_the_last_line_has_the_last_evaluation():
    """Metrics and evaluations of a step come one after the other."""
    file = io.StringIO()
    with RunProgress(3, "RL", True, console=Console(file=file), plain_interval_s=0.0) as progress:
        for step in range(1, 4):
            progress.update(step, {"reward/mean": step / 10})
            progress.update(step, {"eval/accuracy": step / 4})
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["RL 1/3", "RL 2/3", "RL 3/3"]
    assert "accuracy 0.750" in lines[2]


def test_disabled_prints_nothing():
    assert plain_lines(5, {"train/loss": 1.25}, enabled=False) == []


def after(steps: int, seconds: float, metrics: dict[str, float] = RL, total: int = 60, **options) -> RunProgress:
    """A run of 60 steps that has done `steps` in `seconds`."""
    progress = RunProgress(total, "RL", False, **options)
    progress._started -= seconds
    progress.update(steps, metrics)
    return progress


@pytest.mark.parametrize(("width", "line"), [
    (200, "RL 6/60  reward 0.648  accuracy 0.750  fill 1.00  generated tok/s 2,346  trained tok/s 1,900  generate 62%  "
          "4.7 s/step  after 30 s  4 min 30 s left"),
    (110, "RL 6/60  reward 0.648  accuracy 0.750  fill 1.00  generate 62%  4.7 s/step  after 30 s  4 min 30 s left"),
    (85, "RL 6/60  reward 0.648  accuracy 0.750  generate 62%  4.7 s/step  4 min 30 s left"),
    (77, "RL 6/60  reward 0.648  accuracy 0.750  generate 62%  4 min 30 s left"),
    (50, "RL 6/60  reward 0.648  4 min 30 s left"),
    (20, "RL 6/60  reward 0.648  4 min 30 s left")])
def test_of_a_narrow_line_count_reward_and_time_left_stay(width, line):
    progress = after(6, 30.0)
    progress.phase("generate", 2.48)  # the last step generated for 4 s
    assert progress.line(width) == line


@pytest.mark.parametrize(("columns", "has_bar"), [(80, False), (100, False), (140, True)])
@pytest.mark.parametrize("title", ["RL", "SFT"])
def test_a_terminal_shows_one_line_whose_count_and_time_left_are_whole(columns, has_bar, title):
    file = io.StringIO()
    metrics = RL if title == "RL" else {"train/loss": 1.25, "tokens_per_s/train": 15000.0}
    progress = after(6, 30.0, metrics)
    progress.title = title
    progress.phase("generate", 2.48)
    Console(file=file, force_terminal=True, width=columns, color_system=None).print(progress, end="")
    (line,) = file.getvalue().splitlines()
    assert len(line) <= columns and f"{title} 6/60  " in line and line.rstrip().endswith("4 min 30 s left")
    assert ("\u2501" in line) == has_bar and ("reward 0.648" if title == "RL" else "loss 1.2500") in line
    assert ("generate 62%" in line) == (title == "RL") or title == "SFT"


def test_the_spinner_turns_while_nothing_is_said():
    """It shows the next of its 10 pictures every 80 ms."""
    progress, seen = after(6, 30.0), set()
    for tick in range(8):
        file = io.StringIO()
        Console(file=file, force_terminal=True, width=80, color_system=None,
                get_time=lambda now=0.09 * tick: now).print(progress, end="")
        seen.add(file.getvalue()[0])
    assert len(seen) > 2


def test_a_live_terminal_shows_the_last_known_accuracy():
    file = io.StringIO()
    with RunProgress(4, "RL", True, console=Console(file=file, force_terminal=True, width=140)) as progress:
        progress.update(1, {"reward/mean": 0.25, "eval/accuracy": 0.75})
        progress.update(2, {"reward/mean": 0.5})
    assert "2/4" in file.getvalue() and "reward 0.500  accuracy 0.750" in file.getvalue()


@pytest.mark.parametrize(("seconds", "shown"), [(1.0, "train 50%"), (5.0, "train 5 s")])
def test_a_phase_that_takes_longer_than_last_time_shows_its_seconds(seconds, shown):
    progress = after(6, 30.0)
    progress.phase("train", seconds)
    assert shown in progress.line()


def test_before_the_first_step_the_phase_and_the_time_gone_are_shown():
    progress = RunProgress(60, "RL", False)
    progress._started -= 95.0
    progress.phase("generate", 12.0)
    assert progress.line(60) == "RL 0/60  generate 12 s  after 1 min 35 s"


def test_loss_is_shown_for_sft_and_not_beside_a_reward():
    progress = RunProgress(4, "SFT", False)
    progress.update(1, {"train/loss": 1.25})
    assert progress.line().startswith("SFT 1/4  loss 1.2500")
    progress.update(2, {"train/loss": 0.0, "reward/mean": 0.5})
    assert "loss" not in progress.line()


def test_time_left_of_a_resumed_run_counts_only_its_own_steps():
    """Five steps took 50 s: five more take 50 s."""
    assert after(95, 50.0, {}, total=100, first_step=90).line() == "RL 95/100  10.0 s/step  after 50 s  50 s left"


def test_a_sampled_response_is_printed_with_its_verdict_and_cut_if_it_is_long():
    file = io.StringIO()
    progress = RunProgress(4, "RL", True, console=Console(file=file))
    progress.show_sample({"step": 3, "status": "wrong", "reward": -1.0, "response_tokens": 9, "prompt": "3+[b]4",
                          "response": "x" * 700})
    said = file.getvalue().splitlines()
    assert said[:2] == ["step 3, wrong, reward -1, 9 tokens", "3+[b]4"]
    assert said[2].endswith("x ... (700 characters)") and len(said) == 3


def test_the_phase_is_told_to_another_process(tmp_path):
    phases, seen = PhaseFile(tmp_path), []
    assert phases.read() is None
    timers = Timers(phases.write)
    for phase in ("generate", "train"):
        with timers(phase):
            seen.append(phases.read())
    assert [name for name, _ in seen] == ["generate", "train"] and all(0 <= seconds < 60 for _, seconds in seen)
    phases.remove()
    assert phases.read() is None and list(tmp_path.iterdir()) == []


def test_two_programs_of_a_run_may_begin_a_phase_at_the_same_time(tmp_path, monkeypatch):
    """Both have written their own file before either of them replaces phase.json."""
    together, replace = threading.Barrier(2), os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (together.wait(60), replace(*paths)))
    with ThreadPoolExecutor(2) as programs:
        list(programs.map(lambda phase: PhaseFile(tmp_path).write(phase), ("generate", "train")))
    assert PhaseFile(tmp_path).read()[0] in ("generate", "train")
    assert [path.name for path in tmp_path.iterdir()] == ["phase.json"]


def test_a_file_that_is_removed_before_it_is_opened_counts_as_absent(tmp_path, monkeypatch):
    """Somebody removes the folder of a run while its progress is shown."""
    phases, rows = PhaseFile(tmp_path), JsonlTail(tmp_path / "metrics.jsonl", None)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert phases.read() is None and rows.new_rows() == []


@pytest.mark.parametrize("seconds, shown", [(47.6, "48 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"),
                                            (7500, "2 h 05 min")])
def test_duration(seconds, shown):
    assert duration(seconds) == shown
