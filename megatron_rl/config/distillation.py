"""Section `algo.distillation`: teachers that judge the student's own tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from c3po import Divergence
from megatron_rl.config.rules import require


@dataclass(frozen=True)
class TeacherConfig:
    """One teacher: a checkpoint that the trainer's ranks load, or SGLang servers that run already.

    - checkpoint: a Hugging Face folder. Every rank holds its part of it beside the policy, in the policy's layout, and
      computes its log-probabilities before the update.
    - urls: addresses of SGLang servers with the teacher's weights. The orchestrator asks them while responses are still
      being sampled. Start them with --context-length rollout.max_context_tokens + 6.
    - api_key_env: the environment variable that holds the servers' key (--api-key). null: no key.
    """

    checkpoint: str | None = None
    urls: tuple[str, ...] = ()
    api_key_env: str | None = None

    def __post_init__(self):
        require((self.checkpoint is None) != (not self.urls), "a teacher has a checkpoint or urls: set one of the two")
        require(self.api_key_env is None or bool(self.urls),
                f"api_key_env={self.api_key_env} says nothing of a teacher by checkpoint: leave it out")
        for url in self.urls:
            require(urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname),
                    f"urls: {url!r} must look like http://127.0.0.1:30000")


def teachers_at(taught: Mapping[str, str], folders: Mapping[str, Path]) -> list[str]:
    """Overrides of algo.distillation. taught: domain -> its teacher; folders: teacher -> its checkpoint."""
    teachers = ", ".join(f"{name}: {{checkpoint: '{folders[name]}'}}" for name in dict.fromkeys(taught.values()))
    routes = ", ".join(f"{domain}: {name}" for domain, name in taught.items())
    return [f"algo.distillation.teachers={{{teachers}}}", f"algo.distillation.routes={{{routes}}}"]


@dataclass(frozen=True)
class DistillationConfig:
    """On-policy distillation: a token's advantage is A - coef * (ln student - ln teacher), or with top_k the loss has a
    term coef * KL at each token. Without teachers it is off.

    - teachers: by name.
    - routes: domain -> name of the teacher of its prompts. Empty: the only teacher has all. A prompt of a domain
      without a teacher keeps the advantage A.
    - coef: weight of the teacher's judgement.
    - task_reward: false trains on the teachers alone, with A = 0. Responses are judged all the same, for the metrics.
    - top_k: 0 compares the two at the sampled token. k > 0 takes the KL over k tokens of the vocabulary and over all
      others together, at each trained token, with its own gradient.
    - top_k_of: whose k most probable tokens these are, the `teacher`'s or the `student`'s before the update. `student`
      needs teachers by checkpoint.
    - divergence: `reverse` is KL(student || teacher), `forward` is KL(teacher || student), which needs top_k.
    """

    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    coef: float = 1.0
    task_reward: bool = True
    top_k: int = 0
    top_k_of: Literal["teacher", "student"] = "teacher"
    divergence: Divergence = "reverse"

    def __post_init__(self):
        require(0 < self.coef < math.inf, f"algo.distillation.coef={self.coef} must be positive and finite")
        require(self.top_k >= 0, f"algo.distillation.top_k={self.top_k} must not be negative")
        require(self.top_k > 0 or self.divergence == "reverse",
                "algo.distillation.divergence=forward needs algo.distillation.top_k > 0: tokens that the student "
                "sampled estimate the reverse KL alone")
        require(self.top_k > 0 or self.top_k_of == "teacher",
                "algo.distillation.top_k_of=student needs algo.distillation.top_k > 0")
        require(not self.top_k or self.on, f"algo.distillation.top_k={self.top_k} needs algo.distillation.teachers")
        asked = [name for name, teacher in self.teachers.items() if teacher.urls]
        require(self.top_k_of == "teacher" or not asked,
                f"algo.distillation.top_k_of=student, but {', '.join(asked)} has urls: SGLang scores one list of "
                "tokens for all positions of a request (token_ids_logprob), and the student has other tokens at each; "
                "use algo.distillation.top_k_of=teacher, or the teacher's checkpoint")
        require(len(self.teachers) <= 1 or bool(self.routes),
                f"algo.distillation.teachers has {len(self.teachers)} teachers ({', '.join(self.teachers)}): say in "
                "algo.distillation.routes which domain has which")
        for domain, name in self.routes.items():
            require(name in self.teachers, f"algo.distillation.routes.{domain}={name} is no teacher: "
                    f"algo.distillation.teachers has {', '.join(self.teachers) or 'none'}")
        idle = self.teachers.keys() - set(self.routes.values()) if self.routes else set()
        require(not idle, f"algo.distillation.teachers: no domain has {', '.join(sorted(idle))}: add it to "
                "algo.distillation.routes or leave it out")

    @property
    def on(self) -> bool:
        return bool(self.teachers)

    def teacher_of(self, domain: str) -> str | None:
        """The name of the teacher of this domain's prompts."""
        return self.routes.get(domain) if self.routes else next(iter(self.teachers), None)

    def check_routes(self, domains: Collection[str]) -> None:
        """ValueError for a route of a domain that no prompt has."""
        for idle in sorted(self.routes.keys() - set(domains)):
            raise ValueError(f"algo.distillation.routes.{idle}: no prompt of `data` has that domain, they have "
                             f"{', '.join(sorted(domains))}: correct it or leave it out")

    def check_domains(self, domains: Collection[str]) -> None:
        """ValueError for a domain of the prompts in which nothing would be learned."""
        untaught = sorted(domain for domain in domains if self.teacher_of(domain) is None)
        require(self.task_reward or not untaught,
                f"algo.distillation.task_reward=false, but domain {', '.join(untaught)} has no teacher: add "
                f"{'it to algo.distillation.routes' if self.on else 'algo.distillation.teachers'}")

    @property
    def checkpoints(self) -> dict[str, str]:
        """The key of each teacher that the ranks hold, and its folder."""
        return {f"algo.distillation.teachers.{name}.checkpoint": teacher.checkpoint
                for name, teacher in self.teachers.items() if teacher.checkpoint is not None}

    def place_of(self, domain: str) -> int:
        """The place of that teacher among all, -1 if there is none."""
        name = self.teacher_of(domain)
        return -1 if name is None else list(self.teachers).index(name)
