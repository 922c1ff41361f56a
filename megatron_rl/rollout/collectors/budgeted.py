"""Samples only what the training budget needs, without favouring short responses."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from megatron_rl.rollout.collectors.base import BudgetFill, FillCount, Ledger, Prompts, Running, response_tokens
from megatron_rl.rollout.responses import Judged, Responder, as_group
from megatron_rl.types import Prompt, RolloutGroup

MEMORY = 0.5
"""Weight of the last round in the running mean of usable tokens per response."""


class BudgetedCollector:
    """Returns the groups first in order that fill Phi.

    Order. It is fixed before generation: the round's prompts in a permutation drawn from (seed, step, round), each with
    its K responses in sample order. The budget takes whole groups in this order (algo.order=groups; batch.assemble
    takes them as they come), because the advantages of a group need all K rewards. If single responses were permuted,
    nearly every group would hold one that the budget selects, and nothing could be left out. Lengths do not affect the
    order, so the groups returned are exactly those that sampling everything would select.

    What waits for what. Requests go out in order. Whenever a response has been judged, the collector counts the leading
    groups that certainly fill the budget. A finished response offers its tokens, an unfinished one none yet, so the
    count can only shrink. Groups after them are aborted at once. The collector waits for the end of all that are
    counted, also for responses that the budget will cut, because their rewards enter the advantages of the others.

    Over-provisioning. A further group goes out while the groups that are out are expected to bring less than
    overprovision * Phi, and if nothing is under way. Finished responses count their tokens, and others the mean of
    earlier rounds. The first round has no mean, so all its groups go out. This decides when a group is sampled, never
    whether it is trained on.
    """

    def __init__(self, responder: Responder, prompts: Prompts, fill: BudgetFill, *, prompts_per_step: int,
                 overprovision: float, seed: int):
        self._responder, self._prompts, self._fill = responder, prompts, fill
        self._count, self._overprovision, self._seed = prompts_per_step, overprovision, seed
        self._mean_tokens = 0.0
        self._filled: FillCount | None = None

    async def collect(self, step: int, round_: int) -> tuple[list[RolloutGroup], Ledger]:
        responder = self._responder.apart()
        if round_ == 0:
            self._filled = self._fill.count(responder.plan.samples_per_prompt)
        earlier = self._filled.groups
        drawn = self._prompts.next(self._count)
        order = np.random.default_rng([self._seed, step, round_]).permutation(self._count)
        run = _Round(responder, self._filled, [drawn[place] for place in order], step, first_index=round_ * self._count,
                     wanted=self._overprovision * self._fill.tokens, mean_tokens=self._mean_tokens)
        groups = await run.until_filled()
        offered = self._filled.mean_offered(earlier, earlier + len(groups))
        self._mean_tokens = offered if not self._mean_tokens else (
            MEMORY * offered + (1 - MEMORY) * self._mean_tokens)
        returned = [as_group(prompt, group) for prompt, group in zip(run.prompts, groups, strict=False)]
        ledger = Ledger.balance(responder.tally, returned=response_tokens(returned),
                                dropped_responses=run.asked - sum(map(len, groups)))
        return returned, ledger

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self._prompts.state_dict(), "mean_tokens": self._mean_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._prompts.load_state_dict(state["prompts"])
        self._mean_tokens = state.get("mean_tokens", 0.0)


class _Round:
    """One round under way. out[g][k]: response k of the group at place g, None while it has not been judged."""

    def __init__(self, responder: Responder, filled: FillCount, prompts: list[Prompt], step: int, *, first_index: int,
                 wanted: float, mean_tokens: float):
        self.prompts = prompts
        self.asked = 0
        self._responder, self._filled, self._step, self._first_index = responder, filled, step, first_index
        self._wanted, self._mean_tokens = wanted, mean_tokens
        self._earlier = filled.groups
        self._out: list[list[Judged | None]] = []
        self._running: Running[tuple[int, int]] = Running()

    async def until_filled(self) -> list[list[Judged]]:
        """The groups that fill the budget; all groups if they do not."""
        try:
            needed = None
            while True:
                self._send()
                before, needed = needed, self._needed()
                if needed != before:
                    await self._running.cancel(partial(_lies_behind, needed))
                if not self._running:
                    return self._out[:needed]
                for judged, (place, sample) in await self._running.finished():
                    self._out[place][sample] = judged
                    self._filled.judged(self._earlier + place, sample, judged.rollout, judged.score)
        except BaseException:
            await self._running.cancel()
            raise

    def _needed(self) -> int | None:
        """How many groups of this round certainly fill the budget, after those of earlier rounds."""
        needed = self._filled.needed()
        return None if needed is None else max(needed - self._earlier, 0)

    def _send(self) -> None:
        responder = self._responder
        while len(self._out) < len(self.prompts) and (not self._running or self._expected() < self._wanted):
            if self._needed() is not None:
                return
            place, prompt = len(self._out), self.prompts[len(self._out)]
            responder.check_length(prompt, responder.plan)
            self._filled.open()
            self._out.append([None] * responder.plan.samples_per_prompt)
            for ticket in responder.tickets(prompt, step=self._step, index=self._first_index + place):
                self._running.start(responder.respond(ticket, responder.plan), (place, ticket.sample))
                self.asked += 1

    def _expected(self) -> float:
        """Tokens that the groups under way, with those of earlier rounds, are expected to offer to the budget."""
        return self._filled.total + self._mean_tokens * len(self._running)


def _lies_behind(needed: int, of: tuple[int, int]) -> bool:
    return of[0] >= needed
