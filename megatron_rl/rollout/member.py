"""One engine as its fleet sees it: what it holds, whether it answers, and how it has failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from dataclasses import dataclass, field

from megatron_rl.rollout.client import EngineClient

FIRST_REST_S = 0.25
LONGEST_REST_S = 30.0
QUARANTINE_FAILURES = 3


@dataclass(eq=False)
class Member:
    """One engine of the fleet.

    - version: the version of the weights that it is known to hold.
    - failures: in a row, since its last success.
    - failed_with: the inputs of the requests that failed, since its last success.
    - room: how many requests it may have at a time; None until it has refused one for want of room.
    - gone: set if those who wait for it must go elsewhere.
    - unanswered_since: the time of the first of its requests, or checks, without an answer.
    """

    client: EngineClient
    version: int | None = None
    reachable: bool = True
    updating: bool = False
    updates: int = 0
    update_began: float = 0.0
    in_flight: int = 0
    failures: int = 0
    failed_with: set[Hashable] = field(default_factory=set)
    failed_at: float = 0.0
    resting_until: float = 0.0
    room: int | None = None
    unanswered_since: float | None = None
    last_failure: str = ""
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def quarantined(self) -> bool:
        return self.failures >= QUARANTINE_FAILURES

    @property
    def resting(self) -> bool:
        return self.resting_until > time.monotonic()

    @property
    def full(self) -> bool:
        """Whether it works on as many requests as it has room for."""
        return self.room is not None and self.in_flight >= self.room

    @property
    def free(self) -> bool:
        """Whether it may get a request now, if its weights are the right ones."""
        return (self.reachable and self.unanswered_since is None and not self.resting
                and not self.full and not (self.quarantined and self.in_flight))

    def describe(self, newest: int | None) -> str:
        state = ("does not answer" if not self.reachable
                 else f"holds version {self.version}, not {newest}" if self.version != newest
                 else f"failed {self.failures} times in a row" if self.failures else "serves")
        return f"{self.client.base_url} {state}" + (f" ({self.last_failure})" if self.last_failure else "")

    def begin_update(self) -> None:
        self.updating = True
        self.updates += 1
        self.update_began = time.monotonic()

    def end_update(self, version: int) -> None:
        """It has proven that it holds `version`: its earlier failures are forgotten."""
        self.version, self.updating, self.unanswered_since = version, False, None
        self.succeeded()
        self.resting_until, self.room = 0.0, None
        if self.gone.is_set() or not self.reachable:
            self.found()

    def fail_update(self, why: str) -> None:
        """What it holds is unknown; what it was working on goes elsewhere."""
        self.version, self.updating = None, False
        self.failed(why, began=self.update_began)
        self.lost()

    def succeeded(self) -> None:
        self.failures, self.last_failure = 0, ""
        self.failed_with.clear()
        if self.room is not None:
            self.room += 1

    def refused(self, why: str) -> None:
        """Notes that it has no room for more than it is working on. If it works on nothing, it rests."""
        self.last_failure = why
        self.room = max(1, self.in_flight - 1)
        if self.in_flight <= 1:
            self.resting_until = time.monotonic() + FIRST_REST_S

    def failed(self, why: str, *, began: float, about: Hashable = None) -> None:
        """Notes a failure.

        Requests that were under way together fail together, so they count once, with the first reason.

        about: the input of the request. An input that fails again counts once, until this engine answers something or
        another engine answers that input: the input may be at fault. The engine then rests as long as before.
        """
        if began < self.failed_at:
            return
        self.last_failure = why
        self.failures += about is None or about not in self.failed_with
        self.failed_with.add(about)
        self.failed_at = time.monotonic()
        self.resting_until = self.failed_at + min(FIRST_REST_S * 2 ** (self.failures - 1), LONGEST_REST_S)

    def heard(self, asked: float) -> bool:
        """Notes that the server answered a question that was asked at the time `asked`.

        False, and nothing is noted, if a request has found the server gone since: it may have answered before it went.
        """
        if self.unanswered_since is not None and self.unanswered_since > asked:
            return False
        self.unanswered_since = None
        return True

    def lost(self) -> None:
        """Its requests go elsewhere at once."""
        self.reachable = False
        self.gone.set()

    def found(self) -> None:
        self.reachable, self.gone = True, asyncio.Event()
