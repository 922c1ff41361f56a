"""Samples a budget of tokens per step; unfinished responses go on in the next step (C3PO++)."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

from megatron_rl.rollout.collectors.base import Ledger, Prompts, Running, response_tokens
from megatron_rl.rollout.collectors.open_groups import OpenGroup, OpenResponse, group_from_state, group_to_state
from megatron_rl.rollout.fleet import FleetError
from megatron_rl.rollout.responses import Responder, as_group
from megatron_rl.types import Finish, RolloutGroup


class PartialCollector:
    """C3PO++ (arXiv 2510.18855): each round samples exactly budget_tokens tokens and waits for no straggler.

    prompts_per_step groups are open at a time. When a group finishes, the collector returns it and opens a new one, so
    engines stay busy. Responses are sampled in slices of at most slice_tokens. A slice is a request whose input is the
    prompt and everything sampled so far. It takes its tokens from the budget beforehand and gives back what it did not
    use. When the budget is spent, unfinished responses stay open with their tokens, log-probabilities and weight
    versions, and go on in the next round under the weights of that time. Slices bound what a dying engine can lose.
    Their price is one look-up of the prefix per slice, in the engine's cache while the weights are the same.

    What waits for what. The round ends when the slices under way have ended, so slice_tokens bounds its tail. A group
    is returned when all K responses are judged, because advantages need all K. A group that is still open after
    retention_steps steps is dropped whole, and counted; only this disfavours long responses. Everything else is trained
    on in the step in which it finishes, or cut by the budget's own permutation. Which responses a round reaches depends
    on the speed of the engines, so two runs with the same seed may differ.
    """

    def __init__(self, responder: Responder, prompts: Prompts, *, prompts_per_step: int, budget_tokens: int,
                 slice_tokens: int, retention_steps: int, concurrency: int):
        self._responder, self._prompts, self._most_open = responder, prompts, prompts_per_step
        self._budget_tokens, self._slice_tokens = budget_tokens, slice_tokens
        self._retention_steps, self._concurrency = retention_steps, concurrency
        self._open: list[OpenGroup] = []
        self._opened = 0

    async def collect(self, step: int, round_: int) -> tuple[list[RolloutGroup], Ledger]:
        responder = self._with_new_account()
        carried_in = self._carried_tokens()
        dropped = 0
        if round_ == 0:
            self._opened = 0
            dropped = await self._drop_old(step)
        await self._spend(responder, step)
        finished = [group for group in self._open if group.finished]
        self._open = [group for group in self._open if not group.finished]
        groups = [as_group(group.prompt, [response.judged for response in group.responses]) for group in finished]
        return groups, Ledger.balance(
            responder.tally, returned=response_tokens(groups), carried_in=carried_in,
            carried=self._carried_tokens(), dropped_responses=dropped,
            carried_responses=sum(len(group.responses) for group in self._open))

    def _carried_tokens(self) -> int:
        return sum(group.tokens for group in self._open)

    def _with_new_account(self) -> Responder:
        return self._responder.apart()

    async def _drop_old(self, step: int) -> int:
        kept = [group for group in self._open if step - group.step <= self._retention_steps]
        dropped = sum(len(group.responses) for group in self._open) - sum(len(group.responses) for group in kept)
        self._open = kept
        return dropped

    async def _spend(self, responder: Responder, step: int) -> None:
        """Samples budget_tokens tokens: oldest responses first, each again behind the others after its slice."""
        left = self._budget_tokens
        waiting = deque(response for group in self._open for response in group.responses if response.judged is None)
        running: Running[tuple[OpenResponse, int]] = Running()
        try:
            while True:
                while left and len(running) < self._concurrency and (waiting or self._may_open()):
                    if not waiting:
                        waiting.extend(self._open_group(step).responses)
                    response = waiting.popleft()
                    room = responder.plan.max_response_tokens - response.transcript.sampled_tokens
                    asked = min(self._slice_tokens, room, left)
                    left -= asked
                    running.start(_slice(responder, response, asked), (response, asked))
                if not running:
                    return
                for sampled, (response, asked) in await running.finished():
                    left += asked - sampled
                    if response.judged is None:
                        waiting.append(response)
        except BaseException:
            await running.cancel()
            raise

    def _may_open(self) -> bool:
        """Not while so many are open, nor if so many have failed in this round that the next ones would, too."""
        return (sum(not group.finished for group in self._open) < self._most_open
                and sum(group.failed for group in self._open) < self._most_open)

    def _open_group(self, step: int) -> OpenGroup:
        (prompt,) = self._prompts.next(1)
        self._responder.check_length(prompt, self._responder.plan)
        tickets = self._responder.tickets(prompt, step=step, index=self._opened)
        self._opened += 1
        self._open.append(OpenGroup(prompt, step, [OpenResponse(ticket) for ticket in tickets]))
        return self._open[-1]

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self._prompts.state_dict(), "open": [group_to_state(group) for group in self._open]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._prompts.load_state_dict(state["prompts"])
        self._open = [group_from_state(group) for group in state["open"]]


async def _slice(responder: Responder, response: OpenResponse, max_tokens: int) -> int:
    """Samples one slice more; the number of sampled tokens.

    A response that no engine continues ends here, as a failed one.
    """
    had, prompt = response.transcript.sampled_tokens, response.ticket.prompt
    try:
        response.transcript = await responder.sample(response.ticket, responder.plan, response.transcript, max_tokens)
    except FleetError as failure:
        response.judged = responder.failed(prompt, response.transcript, failure)
        response.transcript = replace(response.transcript, finish=Finish.ERROR)
        return 0
    if response.transcript.finish is not None:
        response.judged = await responder.judge(prompt, response.transcript)
    return response.transcript.sampled_tokens - had
