"""An endless, resumable order over a source."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_rl.data.sources import PromptSource
from megatron_rl.types import Prompt

__all__ = ["PromptSampler"]


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
