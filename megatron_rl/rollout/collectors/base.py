"""What all collectors share: their interface, what they draw from, and the account of every sampled token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rl.rollout.fleet import Tally
from megatron_rl.types import Prompt, Rollout, RolloutGroup, Score


@dataclass(frozen=True)
class Ledger:
    """Where the sampled tokens of one collect() went, to the token:

    carried into it + generated = returned + dropped + carried out of it.

    dropped: of aborted responses, of responses past the retention limit, and of attempts that had to be repeated.
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
        """This round and a later one of the same step."""
        return Ledger(
            self.generated_tokens + later.generated_tokens, self.returned_tokens + later.returned_tokens,
            self.dropped_tokens + later.dropped_tokens, later.carried_tokens,
            self.dropped_responses + later.dropped_responses, later.carried_responses, self.retries + later.retries)


class Collector(Protocol):
    """One round of a step's groups at a time, and the account of that round.

    A step asks for further rounds while its budget is not full. Every group is whole: K judged responses.
    """

    async def collect(self, step: int, round_: int) -> tuple[list[RolloutGroup], Ledger]: ...

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on after the last collected step must know; numpy arrays and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prompts(Protocol):
    """An endless, resumable order of prompts (data.PromptSampler)."""

    def next(self, n: int) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BudgetFill(Protocol):
    """Knows what fills the training budget of a step (batch.BudgetFill)."""

    @property
    def tokens(self) -> int: ...

    def usable_tokens(self, judged: Sequence[tuple[Rollout, Score] | None]) -> list[int]: ...

    def groups_needed(self, usable_tokens: Sequence[Sequence[int]]) -> int | None: ...


def response_tokens(groups: Sequence[RolloutGroup]) -> int:
    return sum(rollout.response_tokens for group in groups for rollout in group.rollouts)
