"""Samples later steps while the trainer trains."""

from __future__ import annotations

import asyncio
from typing import Any

from megatron_rl.rollout.collectors.base import Ledger, Prompts
from megatron_rl.rollout.collectors.synchronous import SyncCollector
from megatron_rl.rollout.responses import Responder
from megatron_rl.types import RolloutGroup


class AheadCollector:
    """Samples whole steps, as SyncCollector does, up to max_staleness steps ahead of the trainer.

    The requests of step t go out once step t - max_staleness has been collected, so under weights of version t -
    max_staleness at the earliest. A publish in between pauses them, and they go on under the new weights. So no token
    of step t is more than max_staleness versions old. Within the engines the steps queue in order. A run that resumes
    samples again what had not been collected, from the same prompts.
    """

    def __init__(self, responder: Responder, prompts: Prompts, *, prompts_per_step: int, max_staleness: int,
                 last_step: int):
        self._inner = SyncCollector(responder, prompts, prompts_per_step=prompts_per_step)
        self._prompts, self._max_staleness, self._last_step = prompts, max_staleness, last_step
        self._begun: dict[int, asyncio.Task] = {}
        self._state_before: dict[int, dict[str, Any]] = {}

    async def collect(self, step: int, round_: int) -> tuple[list[RolloutGroup], Ledger]:
        if round_:
            return await self._inner.collect(step, round_)
        self._begin(step)
        try:
            groups, ledger = await self._begun[step]
        finally:
            del self._begun[step], self._state_before[step]
        for later in range(step + 1, min(step + self._max_staleness, self._last_step) + 1):
            self._begin(later)
            await asyncio.sleep(0)  # it draws its prompts now, in the order of steps
        return groups, ledger

    def _begin(self, step: int) -> None:
        if step not in self._begun:
            self._state_before[step] = self._inner.state_dict()
            self._begun[step] = asyncio.create_task(self._inner.collect(step, 0))

    def state_dict(self) -> dict[str, Any]:
        return self._state_before[min(self._begun)] if self._begun else self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)
