"""How far a run is, for the person who started it: a live bar on a terminal, sparse lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

# What is shown, in this order, where the run has it: metric, label, format.
SHOWN = (
    ("reward/mean", "reward", "{:.3f}"),
    ("train/loss", "loss", "{:.4f}"),
    ("eval/accuracy", "accuracy", "{:.3f}"),
    ("tokens_per_s/rollout", "generated tok/s", "{:,.0f}"),
    ("tokens_per_s/train", "trained tok/s", "{:,.0f}"),
)


class RunProgress:
    """`with RunProgress(steps, "RL", enabled) as progress: progress.update(step, metrics)`.

    step: steps done so far; metrics: as logged (docs/metrics.md), those in SHOWN are displayed and stay until
    they are replaced. first_step: steps already done when the run began (a resumed run). Away from a terminal it prints
    the first step, the last, and in between at most one line every plain_interval_s seconds.
    """

    def __init__(
        self, total_steps: int, title: str, enabled: bool, *, first_step: int = 0, console: Console | None = None,
        plain_interval_s: float = 5.0,
    ):
        self.total_steps, self.title, self.enabled, self.first_step = total_steps, title, enabled, first_step
        self.console = console if console is not None else Console(file=sys.stderr)
        self.plain_interval_s = plain_interval_s
        self._values: dict[str, float] = {}
        self._started = time.monotonic()
        self._printed: float | None = None
        self._bar: Progress | None = None
        self._warned = False

    def __enter__(self) -> RunProgress:
        self._started = time.monotonic()
        if self.enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[status]}"), console=self.console, transient=False,
            )
            self._task = self._bar.add_task(self.title, total=self.total_steps, completed=self.first_step, status="")
            self._bar.start()
        return self

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that `step` steps are done, and warns once when mismatch/alarm is set."""
        if metrics.get("mismatch/alarm") and not self._warned:
            self._warned = True
            self.console.print(Text(f"step {step}: engine and trainer disagree on log-probabilities "
                                    "(mismatch/mean_abs); trainer.log says more", style="red"), soft_wrap=True)
        self._values.update({name: metrics[name] for name, _, _ in SHOWN if name in metrics})
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=self.status(step))
            return
        now = time.monotonic()
        due = self._printed is None or now - self._printed >= self.plain_interval_s
        if due or step >= self.total_steps:
            self._printed = now
            self.console.print(Text(f"{self.title} {step}/{self.total_steps}  {self.status(step)}"), soft_wrap=True)

    def status(self, step: int) -> str:
        """One line: the shown metrics, then the time left (or, at the end, the time taken)."""
        shown = self._values
        # A loss says little beside a reward: in RL it is near zero by construction.
        parts = [f"{label} {pattern.format(shown[name])}" for name, label, pattern in SHOWN
                 if name in shown and not (name == "train/loss" and "reward/mean" in shown)]
        elapsed_s = time.monotonic() - self._started
        if step >= self.total_steps:
            parts.append(f"took {duration(elapsed_s)}")
        elif step > self.first_step:
            left_s = elapsed_s / (step - self.first_step) * (self.total_steps - step)
            parts.append(f"{duration(left_s)} left")
        return "  ".join(parts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """48 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
