"""Endless, resumable orders over a source: epochs, or draws by pass rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rl.config.rollout import PassRateConfig
from megatron_rl.data.sources import PromptSource
from megatron_rl.types import Prompt

__all__ = ["PassRateSampler", "PromptSampler", "draw_weights", "pass_rate_metrics"]


class PromptSampler:
    """Deals prompts epoch after epoch; each epoch is a permutation drawn from (seed, epoch).

    With shuffle=False every epoch is in source order. A sampler that loads another's state deals exactly
    what the other would have dealt next.
    """

    def __init__(self, source: PromptSource, seed: int, *, shuffle: bool = True):
        self._source, self._seed, self._shuffle = source, seed, shuffle
        self._epoch, self._position = 0, 0
        self._order = self._permutation()

    def next(self, n: int) -> list[Prompt]:
        """The next n prompts; crosses the end of an epoch as often as needed."""
        prompts = []
        while len(prompts) < n:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation()
            prompts.append(self._source.prompt(int(self._order[self._position])))
            self._position += 1
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"size": len(self._source), "seed": self._seed, "shuffle": self._shuffle, "epoch": self._epoch,
                "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken. ValueError if it belongs to another size, seed or shuffle."""
        own = self.state_dict()
        _check_kind(state, own)
        for name, key in (("size", "the data"), ("seed", "run.seed"), ("shuffle", "data.shuffle")):
            if state[name] != own[name]:
                raise ValueError(f"the checkpoint's prompt order has {name}={state[name]}, this run has "
                                 f"{own[name]}: {key} changed, so the order cannot go on")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._source))
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self._source))


class PassRateSampler:
    """Draws prompts by their current pass rate (dynamic pass rating of Ling & Ring 2.6, arXiv 2606.15079).

    That report, at second hand, gives no formula; draw_weights is ours. Every draw takes prompt i with chance
    w_i / sum w among the prompts that this call of next() has not dealt yet. A prompt's rate begins with its first
    judged group and goes on as a running mean. A draw depends on the seed, on the number of draws before it and on the
    rates, so a sampler that loads another's state deals exactly what the other would have dealt next.
    """

    def __init__(self, source: PromptSource, seed: int, config: PassRateConfig):
        self._source, self._seed, self._config = source, seed, config
        self.rates = np.full(len(source), np.nan)
        """float64 by prompt; NaN: never judged."""
        self._places: dict[str, int] = {}
        self._draws = 0

    def next(self, n: int) -> list[Prompt]:
        weights, prompts = draw_weights(self.rates, self._config), []
        while left := min(n - len(prompts), len(weights)):  # again, if this call has dealt every prompt
            # in the order of exponential waits with rates w, as by draw after draw (Efraimidis and Spirakis 2006)
            waits = np.random.default_rng([self._seed, 1, self._draws]).exponential(size=len(weights)) / weights
            first = np.argpartition(waits, left - 1)[:left]
            for place in first[waits[first].argsort()].tolist():
                prompts.append(self._source.prompt(place))
                self._places[prompts[-1].id] = place
            self._draws += left
        return prompts

    def observe(self, prompt: Prompt, rate: float) -> None:
        """rate: the share of a judged group of `prompt` that is right. A prompt that was not dealt here is ignored."""
        place = self._places.get(prompt.id)
        if place is None or self._source.prompt(place).text != prompt.text:  # another section's, of the same id
            return
        before, memory = self.rates[place], self._config.memory
        self.rates[place] = rate if np.isnan(before) else memory * before + (1 - memory) * rate

    def metrics(self) -> dict[str, float]:
        return pass_rate_metrics([self], self._config)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values. dealt: prompt id -> its place and its rate, null if no group of it was judged."""
        return {"size": len(self._source), "seed": self._seed, "draws": self._draws, "dealt": {
            name: [place, None if np.isnan(self.rates[place]) else float(self.rates[place])]
            for name, place in self._places.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken. ValueError if it belongs to another size, seed or kind of order."""
        own = self.state_dict()
        _check_kind(state, own)
        for name, key in (("size", "the data"), ("seed", "run.seed")):
            if state[name] != own[name]:
                raise ValueError(f"the checkpoint's pass rates have {name}={state[name]}, this run has "
                                 f"{own[name]}: {key} changed, so they cannot go on")
        self._draws, self._places = state["draws"], {name: place for name, (place, _) in state["dealt"].items()}
        self.rates[:] = np.nan
        for place, rate in state["dealt"].values():
            self.rates[place] = np.nan if rate is None else rate


def draw_weights(rates: np.ndarray, config: PassRateConfig) -> np.ndarray:
    """w(p) = max(floor, 4 p (1 - p)) for low <= p <= high, floor outside, and 1 for a prompt that was never judged."""
    inside = (rates >= config.low) & (rates <= config.high)
    weights = np.where(inside, np.maximum(config.floor, 4 * rates * (1 - rates)), config.floor)
    return np.where(np.isnan(rates), 1.0, weights)


def pass_rate_metrics(samplers: Sequence[PassRateSampler], config: PassRateConfig) -> dict[str, float]:
    """prompts/* of all sections together (docs/metrics.md)."""
    rates = np.concatenate([sampler.rates for sampler in samplers])
    weights, seen = draw_weights(rates, config), rates[~np.isnan(rates)]
    metrics = {"prompts/judged_fraction": len(seen) / len(rates),
               "prompts/effective_fraction": float(weights.sum() ** 2 / np.square(weights).sum() / len(rates))}
    if len(seen):
        metrics |= {"prompts/pass_rate": float(seen.mean()),
                    "prompts/in_band_fraction": float(((seen >= config.low) & (seen <= config.high)).mean())}
    return metrics


def _check_kind(state: dict[str, Any], own: dict[str, Any]) -> None:
    if state.keys() != own.keys():
        raise ValueError("the checkpoint's prompt order is of another kind: rollout.pass_rate.enabled changed, so the "
                         "order cannot go on")
