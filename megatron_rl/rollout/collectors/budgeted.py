"""Only what the training budget needs, without favouring short responses."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from megatron_rl.rollout.collectors.base import BudgetFill, Ledger, Prompts, response_tokens
from megatron_rl.rollout.responses import Judged, Responder, as_group, cancelled
from megatron_rl.types import Prompt, RolloutGroup

MEMORY = 0.5
"""Weight of the last round in the running mean of usable tokens per response."""


class BudgetedCollector:
    """The groups first in order that fill Phi.

    Order. Fixed before generation: the round's prompts in a permutation drawn from (seed, step, round), each with
    its K responses in sample order. The budget takes whole groups in this order (c3po.order=groups; batch.assemble
    takes them as they come), because the advantages of a group need all K rewards: were single responses permuted,
    nearly every group would hold one that the budget selects, and nothing could be left out. Lengths play no part in
    the order, so the groups returned are exactly those that sampling everything would select.

    What waits for what. Requests go out in order. Whenever a response has been judged, the leading groups that
    certainly fill the budget are counted: a finished response offers its tokens, an unfinished one none yet, so the
    count can only shrink. Groups after them are aborted at once. Those counted are waited for to the end, also
    their responses that the budget will cut: their rewards enter the advantages of the others.

    Over-provisioning. A further group goes out while the groups that are out are expected to bring less than
    overprovision * Phi (finished responses: their tokens; others: the mean of earlier rounds), and when nothing is
    under way. In the first round there is no mean, and all go out. This decides when a group is sampled, never
    whether it is trained on.
    """

    def __init__(self, responder: Responder, prompts: Prompts, fill: BudgetFill, *, prompts_per_step: int,
                 overprovision: float, seed: int):
        self._responder, self._prompts, self._fill = responder, prompts, fill
        self._count, self._overprovision, self._seed = prompts_per_step, overprovision, seed
        self._mean_tokens = 0.0
        self._earlier: list[list[int]] = []

    async def collect(self, step: int, round_: int) -> tuple[list[RolloutGroup], Ledger]:
        responder = self._responder.apart()
        if round_ == 0:
            self._earlier = []
        drawn = self._prompts.next(self._count)
        order = np.random.default_rng([self._seed, step, round_]).permutation(self._count)
        run = _Round(self, responder, [drawn[place] for place in order], step, first_index=round_ * self._count)
        groups = await run.until_filled()
        usable = [self._usable(group) for group in groups]
        self._earlier += usable
        offered = float(np.mean(usable))
        self._mean_tokens = offered if not self._mean_tokens else (
            MEMORY * offered + (1 - MEMORY) * self._mean_tokens)
        returned = [as_group(prompt, group) for prompt, group in zip(run.prompts, groups, strict=False)]
        ledger = Ledger.balance(responder.tally, returned=response_tokens(returned),
                                dropped_responses=run.asked - sum(map(len, groups)))
        return returned, ledger

    def _usable(self, group: list[Judged | None]) -> list[int]:
        return self._fill.usable_tokens([judged and (judged.rollout, judged.score) for judged in group])

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self._prompts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._prompts.load_state_dict(state["prompts"])


class _Round:
    """One round under way. out[g][k]: response k of the group at place g, None while it has not been judged."""

    def __init__(self, collector: BudgetedCollector, responder: Responder, prompts: list[Prompt], step: int, *,
                 first_index: int):
        self.prompts = prompts
        self.asked = 0
        self._collector, self._responder, self._step, self._first_index = collector, responder, step, first_index
        self._out: list[list[Judged | None]] = []
        self._usable: list[list[int]] = []
        self._running: dict[asyncio.Task, tuple[int, int]] = {}

    async def until_filled(self) -> list[list[Judged]]:
        """The groups that fill the budget, or all, if they do not."""
        try:
            while True:
                self._send()
                needed = self._needed()
                await self._abort_after(needed)
                if not self._running:
                    break
                done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    place, sample = self._running.pop(task)
                    self._out[place][sample] = task.result()
                    self._usable[place] = self._collector._usable(self._out[place])
        except BaseException:
            await cancelled(self._running)
            raise
        return self._out[:needed]

    def _needed(self) -> int | None:
        """How many groups of this round certainly fill the budget, after those of earlier rounds."""
        earlier = self._collector._earlier
        needed = self._collector._fill.groups_needed([*earlier, *self._usable])
        return None if needed is None else max(needed - len(earlier), 0)

    def _send(self) -> None:
        responder = self._responder
        while len(self._out) < len(self.prompts) and (not self._running or self._expected() < self._wanted()):
            if self._needed() is not None:
                return
            place, prompt = len(self._out), self.prompts[len(self._out)]
            responder.check_length(prompt, responder.plan)
            samples = responder.plan.samples_per_prompt
            self._out.append([None] * samples)
            self._usable.append([0] * samples)
            for ticket in responder.tickets(prompt, step=self._step, index=self._first_index + place):
                task = asyncio.create_task(responder.respond(ticket, responder.plan))
                self._running[task] = (place, ticket.sample)
            self.asked += samples

    def _wanted(self) -> float:
        return self._collector._overprovision * self._collector._fill.tokens

    def _expected(self) -> float:
        """Tokens that the groups sent out will offer to the budget, with those of earlier rounds."""
        known = sum(map(sum, [*self._collector._earlier, *self._usable]))
        return known + self._collector._mean_tokens * len(self._running)

    async def _abort_after(self, needed: int | None) -> None:
        if needed is not None:
            late = [task for task, (place, _) in self._running.items() if place >= needed]
            for task in late:
                del self._running[task]
            await cancelled(late)
