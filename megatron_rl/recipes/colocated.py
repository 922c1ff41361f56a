"""Training and generation on the same GPUs, one after the other (rollout.engine.colocate)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch

from megatron_rl.batch import StepBatch
from megatron_rl.config.schema import Config
from megatron_rl.loop import Learner
from megatron_rl.observe.timing import Timers
from megatron_rl.recipes.weights import PublishedWeights
from megatron_rl.sync.memory import EngineMemory, free_bytes
from megatron_rl.types import StepResult

_LOG = logging.getLogger(__name__)


def engine_memory(config: Config, device: torch.device) -> EngineMemory | None:
    """None unless engines share the trainer's GPUs. On CPU SGLang obeys and frees nothing, which is said."""
    if not config.rollout.engine.colocate:
        return None
    if device.type == "cpu":
        _LOG.warning("rollout.engine.colocate=true: SGLang has no memory saver on CPU; the engines are told to release "
                     "their memory in every step, and keep it")
    return EngineMemory(partial(free_bytes, device))


class ColocatedLearner:
    """loop.Learner that has the engines make room first and leaves room for them afterwards."""

    def __init__(self, learner: Learner, weights: PublishedWeights):
        self._learner, self._weights = learner, weights

    def learn(self, batches: Sequence[StepBatch], timers: Timers) -> list[StepResult]:
        with timers("release"):
            self._weights.make_room()
        results = self._learner.learn(batches, timers)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what torch keeps for the next step, the engines cannot have
        return results
