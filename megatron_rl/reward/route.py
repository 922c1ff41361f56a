"""reward.routes: which scorer judges which domain."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping

from megatron_rl.config.reward import RewardConfig
from megatron_rl.reward.base import Scorer
from megatron_rl.reward.code import CodeScorer
from megatron_rl.reward.exact import ExactScorer
from megatron_rl.reward.gym import ReasoningGymScorer
from megatron_rl.reward.llm import JudgeScorer
from megatron_rl.reward.math import MathVerifyScorer
from megatron_rl.reward.science import ScienceScorer
from megatron_rl.reward.user import UserScorer

__all__ = ["Routes"]

BUILT_IN: dict[str, Callable[[RewardConfig], Scorer]] = {
    "math_verify": lambda _: MathVerifyScorer(),
    "exact": lambda _: ExactScorer(),
    "reasoning_gym": lambda _: ReasoningGymScorer(),
    "science": lambda config: ScienceScorer(config.relative_tolerance),
    "code": CodeScorer,
    "llm_judge": lambda config: JudgeScorer(config.judge),
}


class Routes:
    """domain -> Scorer, built once from reward.routes. Raises ValueError naming reward.routes.<domain>."""

    def __init__(self, routes: Mapping[str, str], config: RewardConfig | None = None):
        settings = config if config is not None else RewardConfig()
        self._scorers = {domain: _scorer(domain, name, settings) for domain, name in routes.items()}

    def scorers(self) -> tuple[Scorer, ...]:
        return tuple(self._scorers.values())

    def scorer(self, domain: str) -> Scorer:
        self.check_domains([domain])
        return self._scorers[domain]

    def check_domains(self, domains: Iterable[str]) -> None:
        """ValueError naming every domain that has no route."""
        missing = sorted(set(domains) - self._scorers.keys())
        if missing:
            keys = ", ".join(f"reward.routes.{domain}" for domain in missing)
            raise ValueError(f"no scorer for {keys}; set it to {' | '.join(BUILT_IN)} | module.function "
                             f"(routes given: {', '.join(self._scorers) or 'none'})")


def _scorer(domain: str, name: str, config: RewardConfig) -> Scorer:
    if name in BUILT_IN:
        try:
            return BUILT_IN[name](config)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"reward.routes.{domain}={name}: {error}") from error
    if "." in name:
        return UserScorer(domain, name, config.correct_from)
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose {' | '.join(BUILT_IN)} | module.function"
    raise ValueError(f"reward.routes.{domain}={name} is no scorer; {hint}")
