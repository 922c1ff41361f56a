"""Functions of the user's own that look at a run: observe.metrics and observe.rollouts, and what eval.functions return.

None of them can end a run: if one raises or returns nonsense, the run warns with its path and goes on without it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rl.foreign import load_function, told
from megatron_rl.types import RolloutGroup

__all__ = ["OwnMetrics", "own_numbers", "show_rollouts"]

_LOG = logging.getLogger(__name__)

Function = Callable[[Sequence[RolloutGroup]], Mapping[str, float]]


class OwnMetrics:
    """The functions of observe.metrics. ValueError names the path that cannot be imported."""

    def __init__(self, paths: Sequence[str]):
        self._functions: dict[str, Function] = {path: load_function("observe.metrics", path) for path in paths}

    def __call__(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """What they say of the groups of a step, or of an evaluation's set, by name."""
        found: dict[str, float] = {}
        for path, function in self._functions.items():
            try:
                found |= own_numbers(function(groups), found)
            except Exception as error:  # noqa: BLE001 -- the user's code raises what it likes
                _LOG.warning("observe.metrics: %s gave no numbers: %s", path, told(error))
        return found


def show_rollouts(paths: Sequence[str], step: int, groups: Sequence[RolloutGroup]) -> None:
    """Calls the functions of observe.rollouts."""
    for path in paths:
        try:
            load_function("observe.rollouts", path)(step, groups)
        except Exception as error:  # noqa: BLE001 -- the user's code raises what it likes
            _LOG.warning("observe.rollouts: %s failed at step %d: %s", path, step, told(error))


def own_numbers(returned: Any, taken: Mapping[str, float]) -> dict[str, float]:
    """What a function returned, if it is numbers by name. ValueError for anything else, and for names in `taken`."""
    if not isinstance(returned, Mapping):
        raise ValueError(f"it returned {type(returned).__name__}, not numbers by name")
    for name, value in returned.items():
        if not isinstance(name, str) or "/" in name:
            raise ValueError(f"it returned the name {name!r}: a name is a text without a slash")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"it returned {name!r}: {value!r}, which is no finite number")
        if name in taken:
            raise ValueError(f"it returned {name!r}, which another function returns too")
    return dict(returned)
