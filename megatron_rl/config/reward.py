"""Section `reward`: how responses are judged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.rules import require


@dataclass(frozen=True)
class CodeConfig:
    """Limits of generated programs. A problem's own time_s and memory_mb take precedence.

    - time_s: processor seconds of one test of a stdin problem, or of all calls of a function or unit-test problem. By
      the clock a program may take three times that plus 2 s.
    - compile_s: processor seconds of the compiler.
    - memory_mb: memory of all processes of a program together.
    - tolerance: relative and absolute tolerance of decimal numbers in outputs.
    - judge_thinking: whether a code block before </think> counts as the answer.
    """

    time_s: float = 4.0
    compile_s: int = 15
    memory_mb: int = 512
    tolerance: float = 1e-6
    judge_thinking: bool = False

    def __post_init__(self):
        require(self.time_s >= 0.1, f"reward.code.time_s={self.time_s} must be at least 0.1")
        for name in ("compile_s", "memory_mb"):
            require(getattr(self, name) >= 1, f"reward.code.{name}={getattr(self, name)} must be at least 1")
        require(self.tolerance >= 0, f"reward.code.tolerance={self.tolerance} must not be negative")


@dataclass(frozen=True)
class RemoteConfig:
    """A judge on a server that speaks SandboxFusion's protocol (POST url/run_code), for reward.sandbox=remote.

    - url: the address of the server.
    - key_env: the environment variable that holds the server's key, sent as `Authorization: Bearer KEY`. null: no key.
    - timeout_s: how long one request may take beyond the program's own limits.
    - retries: how often a failed request is sent again, with growing pauses.
    """

    url: str | None = None
    key_env: str | None = None
    timeout_s: float = 30.0
    retries: int = 3

    def __post_init__(self):
        require(self.timeout_s > 0, f"reward.remote.timeout_s={self.timeout_s} must be positive")
        require(self.retries >= 0, f"reward.remote.retries={self.retries} must not be negative")
        require(self.url is None or self.url.startswith(("http://", "https://")),
                f"reward.remote.url={self.url} must start with http:// or https://")


SHAPING_TERMS = ("length", "format", "repetition")
THINKING_BEGIN, THINKING_END = "<think>", "</think>"


@dataclass(frozen=True)
class ShapingConfig:
    """One term that is added to the rewards of a group before its advantages (docs/rewards.md has the formulas).

    - term: `length` (short responses of the group are worth more, up to 0.5), `format` (-0.5 if the answer after the
      thoughts begins to think again), `repetition` (down to -1 for a text that compresses well), or the dotted path of
      a function of your own, group -> K numbers.
    - strength: the term is multiplied by it.
    - efforts: the strength by the thinking effort that a problem's column `effort` names, e.g. {low: 1.0, high: 0.1}. A
      problem without the column has `strength`.
    - by_pass_rate: multiply the strength by the share of the group's responses that are right, so that a hard prompt
      is shaped less.
    - ratio: `repetition` begins below this zlib compression ratio.
    """

    term: str = ""
    strength: float = 1.0
    efforts: dict[str, float] = field(default_factory=dict)
    by_pass_rate: bool = False
    ratio: float = 0.2

    def __post_init__(self):
        require(self.term in SHAPING_TERMS or "." in self.term,
                f"reward.shaping={self.term} must be package.module.function, or one of {', '.join(SHAPING_TERMS)}")
        require(self.name != "overlong", f"reward.shaping={self.term}: overlong is the term of "
                "algo.truncated=overlong_penalty; give the function another name")
        for strength in (self.strength, *self.efforts.values()):
            require(math.isfinite(strength), f"reward.shaping: {self.term}: strength={strength} must be finite")
        require(0 < self.ratio <= 1, f"reward.shaping: {self.term}: ratio={self.ratio} must lie in (0, 1]")
        require(self.term == "repetition" or self.ratio == ShapingConfig.ratio,
                f"reward.shaping: {self.term}: ratio={self.ratio} is read with term=repetition alone: leave it out")

    @property
    def name(self) -> str:
        """What its metric is called."""
        return self.term.rpartition(".")[2]


@dataclass(frozen=True)
class JudgeConfig:
    """A language model as a judge, for reward.routes.<domain>=llm_judge: an OpenAI-compatible server.

    - url: the base URL, to which /chat/completions is added.
    - model: the name of the model there.
    - rubric: a text file that says what a good response is, with the places {question}, {reference} and {response}.
    - key_env: the environment variable that holds the server's key, sent as `Authorization: Bearer KEY`. null: no key.
    - timeout_s: how long one request may take.
    - retries: how often a request that fails, or whose answer holds no score, is sent again, with growing pauses.
    - max_tokens: how long the judge's answer may be.
    - correct_from: a response is right from this score on, wrong at 0, and graded in between.
    """

    url: str | None = None
    model: str = "policy"
    rubric: str | None = None
    key_env: str | None = None
    timeout_s: float = 60.0
    retries: int = 2
    max_tokens: int = 512
    correct_from: float = 1.0

    def __post_init__(self):
        require(self.timeout_s > 0, f"reward.judge.timeout_s={self.timeout_s} must be positive")
        require(self.retries >= 0, f"reward.judge.retries={self.retries} must not be negative")
        require(self.max_tokens >= 1, f"reward.judge.max_tokens={self.max_tokens} must be at least 1")
        require(0 < self.correct_from <= 1,
                f"reward.judge.correct_from={self.correct_from} must be a score above 0, at most 1")
        require(self.url is None or self.url.startswith(("http://", "https://")),
                f"reward.judge.url={self.url} must start with http:// or https://")

    @property
    def longest_s(self) -> float:
        """By the clock, with all retries and the pauses between them."""
        return (self.retries + 1) * self.timeout_s + 0.2 * 2 ** self.retries


@dataclass(frozen=True)
class RewardConfig:
    """How responses are judged.

    - routes: domain -> scorer: math_verify, science, code, exact, reasoning_gym, llm_judge, or the dotted path of a
      function.
    - workers: processes that judge. With `llm_judge` it is also how many requests the judge has at a time.
    - timeout_s: processor seconds for one response, for every scorer but code. By the clock it may take three times
      that plus 2 s.
    - relative_tolerance: tolerance of science answers that are numbers.
    - correct_from: if a function returns only a number, the response is right from this number on, wrong at 0 and
      below, and graded in between, which counts as not right. null: numbers alone do not say what is right, so accuracy
      and pass rates are not reported. A function that returns a Score says itself what is right.
    - shaping: terms that are added to the rewards before the advantages. What is called right or wrong does not change.
    - sandbox: where the programs of `code` run. `bubblewrap` isolates them on this machine, and is refused if it
      cannot. `remote` sends them to reward.remote.url. `unsafe` runs them as they are, with your rights and your files.
    """

    routes: dict[str, str] = field(default_factory=lambda: {"math": "math_verify"})
    workers: int = 2
    timeout_s: float = 3.0
    relative_tolerance: float = 0.01
    correct_from: float | None = 1.0
    shaping: tuple[ShapingConfig, ...] = ()
    sandbox: Literal["bubblewrap", "remote", "unsafe"] = "bubblewrap"
    code: CodeConfig = field(default_factory=CodeConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self):
        names = [each.name for each in self.shaping]
        require(len(set(names)) == len(names), f"reward.shaping: {', '.join(names)}: two terms have the same name")
        require(self.workers >= 1, f"reward.workers={self.workers} must be at least 1")
        require(self.timeout_s > 0, f"reward.timeout_s={self.timeout_s} must be positive")
        require(0 <= self.relative_tolerance < 1,
                f"reward.relative_tolerance={self.relative_tolerance} must lie between 0 and 1")
        require(self.correct_from is None or 0 < self.correct_from < math.inf,
                f"reward.correct_from={self.correct_from} must be a positive number, or null without full marks")
        require(self.sandbox != "remote" or self.remote.url is not None,
                "reward.sandbox=remote needs reward.remote.url, such as http://judge:8080")
