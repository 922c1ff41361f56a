"""What all collectors share: their interface, where prompts come from, and the account of every sampled token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rl.rollout.fleet import Tally
from megatron_rl.rollout.responses import cancelled
from megatron_rl.types import Prompt, Rollout, RolloutGroup, Score


@dataclass(frozen=True)
class Ledger:
    """Where the sampled tokens of one collect() went, to the token:

    carried into it + generated = returned + dropped + carried out of it.

    dropped: tokens of aborted responses, of responses past the retention limit, and of attempts that were repeated.
    """

    generated_tokens: int = 0
    returned_tokens: int = 0
    dropped_tokens: int = 0
    carried_tokens: int = 0
    dropped_responses: int = 0
    carried_responses: int = 0
    retries: int = 0

    @classmethod
    def balance(cls, tally: Tally, *, returned: int, carried_in: int = 0, carried: int = 0,
                dropped_responses: int = 0, carried_responses: int = 0) -> Ledger:
        """The account of the requests that `tally` counted."""
        generated = tally.delivered_tokens
        return cls(generated, returned, carried_in + generated - returned - carried, carried, dropped_responses,
                   carried_responses, tally.retries)

    def then(self, later: Ledger) -> Ledger:
        """The account of this round and a later one of the same step."""
        return Ledger(
            self.generated_tokens + later.generated_tokens, self.returned_tokens + later.returned_tokens,
            self.dropped_tokens + later.dropped_tokens, later.carried_tokens,
            self.dropped_responses + later.dropped_responses, later.carried_responses, self.retries + later.retries)


class Collector(Protocol):
    """Returns one round of a step's groups at a time, with the account of that round.

    A step asks for further rounds while its budget is not full. Every group is whole: K judged responses.
    """

    async def collect(self, step: int, round_: int) -> tuple[list[RolloutGroup], Ledger]: ...

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on after the last collected step; numpy arrays and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prompts(Protocol):
    """An endless, resumable order of prompts (data.PromptSampler)."""

    def next(self, n: int) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FillCount(Protocol):
    """Counts what the groups of one step offer to its budget (batch.FillCount)."""

    total: int

    @property
    def groups(self) -> int: ...

    def open(self) -> int: ...

    def judged(self, place: int, sample: int, rollout: Rollout, score: Score) -> None: ...

    def needed(self) -> int | None: ...

    def mean_offered(self, first: int, end: int) -> float: ...


class BudgetFill(Protocol):
    """Knows what fills the training budget of a step (batch.BudgetFill)."""

    @property
    def tokens(self) -> int: ...

    def count(self, responses_per_prompt: int) -> FillCount: ...


class Running[T]:
    """Tasks under way, each with what it is for. `finished` returns them as they end. Its cost does not grow with their
    number, while asyncio.wait looks at all of them in every call.
    """

    def __init__(self) -> None:
        self._of: dict[asyncio.Task, T] = {}
        self._ended: asyncio.Queue[asyncio.Task] = asyncio.Queue()

    def __len__(self) -> int:
        return len(self._of)

    def start(self, coroutine: Coroutine[Any, Any, Any], of: T) -> None:
        task = asyncio.create_task(coroutine)
        self._of[task] = of
        task.add_done_callback(self._ended.put_nowait)

    async def finished(self) -> list[tuple[Any, T]]:
        """(result, what it was for) of all tasks that have ended, at least one, in the order in which they ended."""
        ended = [await self._ended.get()]
        while not self._ended.empty():
            ended.append(self._ended.get_nowait())
        return [(task.result(), self._of.pop(task)) for task in ended if task in self._of]

    async def cancel(self, unwanted: Callable[[T], bool] = lambda _: True) -> None:
        """Cancels the tasks that are for something unwanted, and waits until they have cleaned up."""
        late = [task for task, of in self._of.items() if unwanted(of)]
        for task in late:
            del self._of[task]
        await cancelled(late)


def response_tokens(groups: Sequence[RolloutGroup]) -> int:
    return sum(rollout.response_tokens for group in groups for rollout in group.rollouts)
