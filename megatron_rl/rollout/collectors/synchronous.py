"""Samples every response of the step's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_rl.rollout.collectors.base import Ledger, Prompts, response_tokens
from megatron_rl.rollout.responses import Responder
from megatron_rl.types import Prompt, RolloutGroup


class SyncCollector:
    """All K responses of prompts_per_step prompts; waits for the longest."""

    def __init__(self, responder: Responder, prompts: Prompts, *, prompts_per_step: int):
        self._responder, self._prompts, self._count = responder, prompts, prompts_per_step

    def draw(self) -> list[Prompt]:
        """The prompts of one round."""
        return self._prompts.next(self._count)

    async def collect(self, step: int, round_: int) -> tuple[list[RolloutGroup], Ledger]:
        return await self.sample(self.draw(), step, round_)

    async def sample(self, prompts: Sequence[Prompt], step: int, round_: int) -> tuple[list[RolloutGroup], Ledger]:
        responder = self._responder.apart()
        groups = await responder.groups(prompts, step=step, first_index=round_ * self._count)
        return groups, Ledger.balance(responder.tally, returned=response_tokens(groups))

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self._prompts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._prompts.load_state_dict(state["prompts"])
