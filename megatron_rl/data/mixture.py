"""Mixes several sources: prompts in the ratio of weights, which may change along a curriculum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_rl.config.data import KEYS, CurriculumStage, DataConfig
from megatron_rl.config.rollout import PassRateConfig
from megatron_rl.data.sampler import PassRateSampler, PromptSampler, pass_rate_metrics
from megatron_rl.data.sources import Limits, PromptSource, build_source
from megatron_rl.types import Prompt

__all__ = ["MixedSampler", "MixedSource", "build_prompts", "build_rated_sampler", "build_sampler", "heldout"]


class MixedSource:
    """A PromptSource over named parts.

    Indices interleave them: every prefix holds the parts in the ratio of their sizes.
    """

    def __init__(self, parts: Mapping[str, PromptSource]):
        self.parts = dict(parts)
        places = [(np.arange(len(part)) + 0.5) / len(part) for part in self.parts.values()]
        owner = np.repeat(np.arange(len(places)), [len(place) for place in places])
        inner = np.concatenate([np.arange(len(place)) for place in places])
        order = np.argsort(np.concatenate(places), kind="stable")
        self._owner, self._inner, self._sources = owner[order], inner[order], list(self.parts.values())

    @property
    def domains(self) -> frozenset[str]:
        return frozenset().union(*(part.domains for part in self._sources))

    def __len__(self) -> int:
        return len(self._inner)

    def prompt(self, index: int) -> Prompt:
        part, inner = self._place(index)
        return part.prompt(inner)

    def sft_example(self, index: int) -> tuple[Prompt, list[int]]:
        part, inner = self._place(index)
        return part.sft_example(inner)

    def objections(self, number: int) -> list[str]:
        first = np.bincount(self._owner[:number], minlength=len(self._sources))
        return [why for part, count in zip(self._sources, first, strict=True) for why in part.objections(int(count))]

    def questions(self) -> frozenset[str]:
        return frozenset().union(*(part.questions() for part in self._sources))

    def _place(self, index: int) -> tuple[PromptSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of a source of {len(self)}")
        return self._sources[self._owner[index]], int(self._inner[index])


class MixedSampler:
    """Deals from each part in its own resumable order.

    After n prompts of a stage, a part has had n * weight of them, with an
    error of less than one per part.

    The part that is furthest behind its share comes next, so a mixture has no randomness. It accepts the state of a run
    with other weights: each part goes on where it was, and the new ratio holds from there.
    """

    def __init__(self, source: MixedSource, stages: Sequence[CurriculumStage],
                 samplers: Mapping[str, PromptSampler | PassRateSampler]):
        self._samplers = dict(samplers)
        sizes = {name: len(part) for name, part in source.parts.items()}
        self._stages = [(stage.prompts, _shares(stage.weights or sizes)) for stage in stages]
        self._stage = 0
        self._dealt = dict.fromkeys(self._samplers, 0)

    def next(self, n: int) -> list[Prompt]:
        names = [self._part() for _ in range(n)]
        dealt = {name: iter(self._samplers[name].next(count)) for name, count in Counter(names).items()}
        return [next(dealt[name]) for name in names]

    def _part(self) -> str:
        """The section of the next prompt."""
        prompts, shares = self._stages[self._stage]
        if prompts is not None and sum(self._dealt.values()) == prompts:
            self._stage, self._dealt = self._stage + 1, dict.fromkeys(self._samplers, 0)
            _, shares = self._stages[self._stage]
        total = sum(self._dealt.values()) + 1
        name = max(shares, key=lambda part: shares[part] * total - self._dealt[part])
        self._dealt[name] += 1
        return name

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"stages": self._plan(), "stage": self._stage, "dealt": dict(self._dealt),
                "parts": {name: sampler.state_dict() for name, sampler in self._samplers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken. ValueError if a part changed, or if there are other parts."""
        if state["parts"].keys() != self._samplers.keys():
            raise ValueError(f"the checkpoint's prompt order mixes {', '.join(state['parts'])}, this run "
                             f"{', '.join(self._samplers)}: data.mix changed, so the order cannot go on")
        for name, sampler in self._samplers.items():
            sampler.load_state_dict(state["parts"][name])
        if state["stages"] == self._plan():
            self._stage, self._dealt = state["stage"], dict(state["dealt"])

    def _plan(self) -> list[list[Any]]:
        return [[prompts, dict(shares)] for prompts, shares in self._stages]


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items() if weight}


def heldout(config: DataConfig, *, seed: int, size: int) -> DataConfig:
    """The held-out problems of the data that `config` trains on; generators draw `size` of them from `seed`."""
    if config.source == "mix":
        parts = {name: heldout(part, seed=seed, size=part.size) for name, part in config.mix.items()}
        return replace(config, mix=parts, split="all", weights={}, curriculum=(), shuffle=True)
    drawn = {"seed": seed, "size": size} if "seed" in KEYS[config.source] else {}
    return replace(config, split="heldout", shuffle=True, **drawn)


def build_prompts(config: DataConfig, tokenizer: Any, limits: Limits) -> PromptSource:
    """The source that `config` names, mixed or not. ValueError as build_source raises it, with the section's name.

    data.split of a mix holds for every section, unless it is `all`.
    """
    if config.source != "mix":
        return build_source(config, tokenizer, limits)
    parts = {}
    for name, part in config.mix.items():
        chosen = part if config.split == "all" else replace(part, split=config.split)
        try:
            parts[name] = build_source(chosen, tokenizer, limits)
        except ValueError as error:
            raise ValueError(f"data.mix.{name}: {error}") from error
    return MixedSource(parts)


class RatedMixedSampler(MixedSampler):
    """A MixedSampler whose parts draw by pass rate."""

    def __init__(self, source: MixedSource, stages: Sequence[CurriculumStage], samplers: Mapping[str, PassRateSampler],
                 config: PassRateConfig):
        super().__init__(source, stages, samplers)
        self._rated, self._config = samplers, config

    def observe(self, prompt: Prompt, rate: float) -> None:
        for sampler in self._rated.values():
            sampler.observe(prompt, rate)

    def metrics(self) -> dict[str, float]:
        return pass_rate_metrics(list(self._rated.values()), self._config)


def build_sampler(source: PromptSource, config: DataConfig, seed: int) -> PromptSampler | MixedSampler:
    """The endless order over `source` (from build_prompts) that data.shuffle, .weights and .curriculum describe."""
    if isinstance(source, MixedSource):
        return MixedSampler(source, _stages(config), {name: PromptSampler(part, seed, shuffle=config.shuffle)
                                                      for name, part in source.parts.items()})
    return PromptSampler(source, seed, shuffle=config.shuffle)


def build_rated_sampler(source: PromptSource, config: DataConfig, seed: int,
                        rates: PassRateConfig) -> PassRateSampler | RatedMixedSampler:
    """The same with draws by pass rate instead of epochs: rollout.pass_rate."""
    if isinstance(source, MixedSource):
        samplers = {name: PassRateSampler(part, seed, rates) for name, part in source.parts.items()}
        return RatedMixedSampler(source, _stages(config), samplers, rates)
    return PassRateSampler(source, seed, rates)


def _stages(config: DataConfig) -> Sequence[CurriculumStage]:
    return config.curriculum or (CurriculumStage(config.weights),)
