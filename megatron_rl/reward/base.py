"""What a scorer is: a function of (prompt, response text), split so that its costly part can run in a worker."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rl.foreign import told
from megatron_rl.types import Prompt, Score

__all__ = ["Job", "Judgement", "STATUSES", "Scorer", "needs_answer", "run", "verdict"]

STATUSES = ("correct", "wrong", "no_answer", "timeout", "error", "graded",
            "compile_error", "runtime_error", "memory_limit", "output_limit")  # these four: of programs


@dataclass(frozen=True)
class Job:
    """The costly part of one judgement: an importable function and picklable arguments, run in a worker.

    memo_key: holds everything the function reads, so equal keys have equal scores. None: the score is never remembered.
    timeout_s: limit of this job, if reward.timeout_s does not apply to it. overdue: the status of a job over its limit;
    `error` where the response is not to blame.
    """

    function: Callable[..., Score]
    args: tuple[Any, ...]
    memo_key: Hashable | None
    timeout_s: float | None = None
    overdue: str = "timeout"

    def run(self) -> Score:
        """The score. If the function raises, the status is `error`, with the exception's type and message."""
        foreign = _ForeignCode()
        with foreign:
            return self.function(*self.args)
        return Score(0.0, "error", foreign.failure)


@dataclass(frozen=True)
class Judgement(Score):
    """A verdict of another model, with what it cost: requests, and tokens that were read and written for them."""

    requests: int = 0
    tokens: int = 0


class Scorer(Protocol):
    """Judges the responses of one domain.

    - prepare: does the cheap part in this process. It returns the Score if that decides it, else the Job that does.
    - score: both parts in this process, without a time limit.
    - check: ValueError if the prompt lacks what the scorer needs; called for every row before a run starts.
    - warm_up: run once in each worker before its first job (imports); None if prepare always decides.
    - preload: modules that a worker needs.
    """

    preload: tuple[str, ...]
    warm_up: Callable[[], None] | None

    def prepare(self, prompt: Prompt, response_text: str) -> Score | Job: ...

    def score(self, prompt: Prompt, response_text: str) -> Score: ...

    def check(self, prompt: Prompt) -> None: ...


def run(prepared: Score | Job) -> Score:
    """The Score that Scorer.prepare returned, or that its Job computes in this process."""
    return prepared.run() if isinstance(prepared, Job) else prepared


def needs_answer(prompt: Prompt) -> None:
    """ValueError if the prompt has no reference answer."""
    if not prompt.answer.strip():
        raise ValueError(f"prompt {prompt.id}: no reference answer, which reward.routes.{prompt.domain} compares with")


def verdict(correct: bool) -> Score:
    return Score(1.0, "correct") if correct else Score(0.0, "wrong")


class _ForeignCode:
    """Keeps an exception of foreign code as text. It may be of any type, and many types do not pickle."""

    failure = ""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failure = told(error)
        return True
