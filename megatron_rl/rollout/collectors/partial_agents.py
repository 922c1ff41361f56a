"""C3PO++ with agents: a conversation goes on over steps, and the agent in it notices nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from megatron_rl.rollout.collectors.base import Running
from megatron_rl.rollout.collectors.open_groups import OpenGroup, OpenResponse, group_to_state
from megatron_rl.rollout.collectors.partial import PartialCollector
from megatron_rl.rollout.responses import Responder
from megatron_rl.rollout.slices import Allowance, Slices


class PartialAgentsCollector(PartialCollector):
    """Samples exactly budget_tokens tokens a round over all agents, and waits for no straggler (C3PO++).

    Agents run on their own, across rounds. Each of their requests is sampled in slices, which take their tokens from
    the round's budget. A request that finds the budget spent waits in its HTTP request, and goes on from its tokens
    in the next round under the weights of that time. Requests get slices in the order in which they ask.

    A round ends when its budget is spent and the slices under way have ended. prompts_per_step groups are open at a
    time, and all their agents run, up to rollout.agent.concurrency. Groups that are too old are dropped as without
    agents, and their agents end. A conversation cannot be kept in a checkpoint: after a resume the agents of open
    groups start again from their first message, and the tokens of the lost conversations are in no account.
    """

    def __init__(self, responder: Responder, prompts: Any, *, slice_tokens: int, **options: Any):
        super().__init__(responder.apart(), prompts, slice_tokens=slice_tokens, **options)
        self._allowance = Allowance(slice_tokens)
        self._running: Running[OpenResponse] = Running()

    def _with_new_account(self) -> Responder:
        """Sessions hold on to their tally; between rounds nothing is sampled."""
        tally = self._responder.tally
        tally.delivered_tokens = tally.retries = 0
        return self._responder

    async def _drop_old(self, step: int) -> int:
        dropped = await super()._drop_old(step)
        kept = {id(response) for group in self._open for response in group.responses}
        await self._running.cancel(lambda response: id(response) not in kept)
        return dropped

    async def _spend(self, responder: Responder, step: int) -> None:
        self._allowance.grant(self._budget_tokens)
        try:
            for group in self._open:
                self._start(group)
            while not self._allowance.spent.is_set():
                while self._allowance.left and self._may_open():
                    self._start(self._open_group(step))
                if not self._running:
                    return
                await self._end_of_one()
        except BaseException:
            await self._running.cancel()
            raise

    def _start(self, group: OpenGroup) -> None:
        for response in group.responses:
            if response.slices is None:
                response.slices = Slices(self._allowance)
                self._running.start(self._play(response), response)

    async def _play(self, response: OpenResponse) -> None:
        plan = replace(self._responder.plan, slices=response.slices)
        response.judged = await self._responder.respond(response.ticket, plan)

    async def _end_of_one(self) -> None:
        """Waits until an agent has ended or the budget is spent."""
        ending = asyncio.create_task(self._running.finished())
        spent = asyncio.create_task(self._allowance.spent.wait())
        try:
            await asyncio.wait({ending, spent}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                ending.result()
        finally:
            ending.cancel()
            spent.cancel()

    def state_dict(self) -> dict[str, Any]:
        anew = [OpenGroup(group.prompt, group.step, [OpenResponse(response.ticket) for response in group.responses])
                for group in self._open]
        return {"prompts": self._prompts.state_dict(), "open": [group_to_state(group) for group in anew]}
