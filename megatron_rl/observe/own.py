"""Metrics of the user's own: functions over judged groups, named by dotted path in observe.metrics.

A function takes the groups (of a step, or of an evaluation's set) and returns names and numbers. They are logged as
extra/<name> in metrics.jsonl and as <name> in eval.jsonl. A number that cannot be said is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_rl.foreign import load_function
from megatron_rl.types import RolloutGroup

__all__ = ["OwnMetrics"]

Function = Callable[[Sequence[RolloutGroup]], Mapping[str, float]]


class OwnMetrics:
    """Imports the functions once. ValueError names observe.metrics and the path that cannot be imported."""

    def __init__(self, paths: Sequence[str]):
        self._functions = {path: load_function("observe.metrics", path) for path in paths}

    def __call__(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """What all of them say. ValueError if a function returns anything but names without a slash and numbers, or a
        name that another one has."""
        found: dict[str, float] = {}
        for path, function in self._functions.items():
            for name, value in function(groups).items():
                if "/" in name or isinstance(value, bool) or not isinstance(value, int | float):
                    raise ValueError(f"observe.metrics: {path} returned {name!r}: {value!r}; give names without a "
                                     "slash, each with an int or a float")
                if name in found:
                    raise ValueError(f"observe.metrics: {path} returned {name!r}, which another function returns too")
                found[name] = value
        return found

