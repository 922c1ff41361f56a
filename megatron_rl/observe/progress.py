"""How far a run is, for the person who started it: a live line on a terminal, sparse lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

# What is shown, in this order, where the run has it: metric, label, format, rank. Of a line that is too long the parts
# with the highest rank go first; those of rank 0 stay.
SHOWN = (
    ("reward/mean", "reward", "{:.3f}", 0),
    ("train/loss", "loss", "{:.4f}", 0),
    ("eval/accuracy", "accuracy", "{:.3f}", 1),
    ("budget/fill", "fill", "{:.2f}", 5),
    ("tokens_per_s/rollout", "generated tok/s", "{:,.0f}", 6),
    ("tokens_per_s/train", "trained tok/s", "{:,.0f}", 7),
)
LEFT, PHASE, PER_STEP, ELAPSED = 0, 2, 3, 4  # ranks of what is not a metric
BAR_CELLS, BAR_FROM_COLUMNS = 16, 110
SAMPLE_CHARACTERS = 600


@dataclass(frozen=True)
class Part:
    """A piece of the line. rank: see SHOWN."""

    text: str
    rank: int


class RunProgress:
    """`with RunProgress(steps, "RL", enabled) as progress: progress.update(step, metrics)`.

    step: steps done so far; metrics: as logged (docs/metrics.md), those in SHOWN are displayed and stay until
    they are replaced. first_step: steps already done when the run began (a resumed run). Away from a terminal it prints
    the first step, the last, and in between at most one line every plain_interval_s seconds; no step twice.
    """

    def __init__(
        self, total_steps: int, title: str, enabled: bool, *, first_step: int = 0, console: Console | None = None,
        plain_interval_s: float = 5.0,
    ):
        self.total_steps, self.title, self.enabled, self.first_step = total_steps, title, enabled, first_step
        self.console = console if console is not None else Console(file=sys.stderr)
        self.plain_interval_s = plain_interval_s
        self.step = first_step
        self._values: dict[str, float] = {}
        self._phase: tuple[str, float] | None = None
        self._took_s: dict[str, float] = {}
        self._started = time.monotonic()
        self._printed: tuple[int, float] | None = None
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._warned = False

    def __enter__(self) -> RunProgress:
        self._started = time.monotonic()
        if self.enabled and self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that `step` steps are done, and warns once when mismatch/alarm is set."""
        if metrics.get("mismatch/alarm") and not self._warned:
            self._warned = True
            self.console.print(Text(f"step {step}: engine and trainer disagree on log-probabilities "
                                    "(mismatch/mean_abs); orchestrator.log says more", style="red"), soft_wrap=True)
        self._values.update({name: metrics[name] for name, *_ in SHOWN if name in metrics})
        self._took_s.update({name.removeprefix("time/"): value for name, value in metrics.items()
                             if name.startswith("time/")})
        self.step = step
        if not self.enabled or self._live is not None:
            return
        new = self._printed is None or self._printed[0] < step
        due = self._printed is None or time.monotonic() - self._printed[1] >= self.plain_interval_s
        if new and due and step < self.total_steps:  # the last line waits for the last evaluation
            self._print_plain()

    def phase(self, name: str, seconds: float) -> None:
        """What the step that is under way does, and for how long already."""
        self._phase = (name, seconds)

    def show_sample(self, sample: Mapping[str, Any]) -> None:
        """Prints one judged response (a row of samples.jsonl) above the line."""
        if not self.enabled:
            return
        response = sample["response"]
        if len(response) > SAMPLE_CHARACTERS:
            response = f"{response[:SAMPLE_CHARACTERS]} ... ({len(sample['response']):,} characters)"
        head = (f"step {sample['step']}, {sample['status']}, reward {sample['reward']:.3g}, "
                f"{sample['response_tokens']} tokens")
        self.console.print(Text(head, style="bold"), Text(sample["prompt"]), Text(response, style="cyan"), sep="\n",
                           soft_wrap=True)

    def parts(self) -> list[Part]:
        """The pieces of the line in order."""
        shown, elapsed_s = self._values, time.monotonic() - self._started
        # A loss says little beside a reward: in RL it is near zero by construction.
        found = [Part(f"{label} {pattern.format(shown[name])}", rank) for name, label, pattern, rank in SHOWN
                 if name in shown and not (name == "train/loss" and "reward/mean" in shown)]
        if self.step >= self.total_steps:
            return [*found, Part(f"took {duration(elapsed_s)}", LEFT)]
        if self._phase is not None:
            found.append(Part(self._phase_text(*self._phase), PHASE))
        if self.step > self.first_step:
            each_s = elapsed_s / (self.step - self.first_step)
            step_s = self._took_s.get("step", each_s)  # the run's mean also holds its set-up and evaluations
            found += [Part(f"{step_s:.1f} s/step", PER_STEP), Part(f"after {duration(elapsed_s)}", ELAPSED),
                      Part(f"{duration(each_s * (self.total_steps - self.step))} left", LEFT)]
        else:
            found.append(Part(f"after {duration(elapsed_s)}", LEFT))
        return found

    def _phase_text(self, name: str, seconds: float) -> str:
        """With the share of what the phase took in the last step, as long as that says something."""
        usual = self._took_s.get(name, 0.0)
        return f"{name} {seconds / usual:.0%}" if 0 < seconds < usual else f"{name} {duration(seconds)}"

    def line(self, width: int | None = None) -> str:
        """Title, count and the parts that fit into `width` cells (None: all)."""
        head, parts = f"{self.title} {self.step}/{self.total_steps}", self.parts()
        while width is not None and len(_joined(head, parts)) > width and any(part.rank for part in parts):
            last = max(part.rank for part in parts)
            parts = [part for part in parts if part.rank != last]
        return _joined(head, parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """One line on a terminal: a spinner that shows life, a bar if there is room for it, and the line."""
        width = options.max_width - 3
        cells: list[Any] = [self._spinner]
        if options.max_width >= BAR_FROM_COLUMNS:
            width -= BAR_CELLS + 2
            cells.append(ProgressBar(self.total_steps, self.step, width=BAR_CELLS))
        grid = Table.grid(padding=(0, 2 if len(cells) > 1 else 1))
        grid.add_row(*cells, Text(self.line(width), no_wrap=True, overflow="ellipsis"))
        yield grid

    def _print_plain(self) -> None:
        self._printed = (self.step, time.monotonic())
        self.console.print(Text(self.line()), soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._phase = None
        if self._live is not None:
            self._live.stop()
        elif self.enabled and self.step > (self.first_step if self._printed is None else self._printed[0]):
            self._print_plain()


def _joined(head: str, parts: list[Part]) -> str:
    return "  ".join([head, *(part.text for part in parts)])


def duration(seconds: float) -> str:
    """48 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
