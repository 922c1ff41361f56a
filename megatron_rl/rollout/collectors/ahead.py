"""Samples later steps while the trainer trains."""

from __future__ import annotations

import asyncio
from typing import Any

from megatron_rl.rollout.collectors.base import Ledger, Prompts
from megatron_rl.rollout.collectors.open_groups import prompt_from_state, prompt_to_state
from megatron_rl.rollout.collectors.synchronous import SyncCollector
from megatron_rl.rollout.responses import Responder
from megatron_rl.types import Prompt, RolloutGroup


class AheadCollector:
    """Samples whole steps, as SyncCollector does, up to max_staleness steps ahead of the trainer.

    The requests of step t go out once step t - max_staleness has been collected, so under weights of version t -
    max_staleness at the earliest. A publish in between pauses them, and they go on under the new weights. So no token
    of step t is more than max_staleness versions old. Within the engines the steps queue in order. A run that resumes
    samples again what had not been collected, from the same prompts: these are in the state, because which prompts come
    next may depend on what was judged since they were drawn (rollout.pass_rate).
    """

    def __init__(self, responder: Responder, prompts: Prompts, *, prompts_per_step: int, max_staleness: int,
                 last_step: int):
        self._inner = SyncCollector(responder, prompts, prompts_per_step=prompts_per_step)
        self._max_staleness, self._last_step = max_staleness, last_step
        self._begun: dict[int, asyncio.Task] = {}
        self._drawn: dict[int, list[Prompt]] = {}

    async def collect(self, step: int, round_: int) -> tuple[list[RolloutGroup], Ledger]:
        if round_:
            return await self._inner.collect(step, round_)
        self._begin(step)
        try:
            groups, ledger = await self._begun[step]
        finally:
            del self._begun[step], self._drawn[step]
        for later in range(step + 1, min(step + self._max_staleness, self._last_step) + 1):
            self._begin(later)
        return groups, ledger

    def _begin(self, step: int) -> None:
        if step not in self._begun:
            if step not in self._drawn:
                self._drawn[step] = self._inner.draw()
            self._begun[step] = asyncio.create_task(self._inner.sample(self._drawn[step], step, 0))

    def state_dict(self) -> dict[str, Any]:
        return {**self._inner.state_dict(), "drawn": [
            [step, [prompt_to_state(prompt) for prompt in prompts]] for step, prompts in self._drawn.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)
        self._drawn = {step: [prompt_from_state(prompt) for prompt in prompts]
                       for step, prompts in state.get("drawn", [])}
