"""One engine as its fleet sees it: what it holds, whether it answers, and how it has failed."""

from __future__ import annotations

import asyncio
import time
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
    failed_at: float = 0.0
    resting_until: float = 0.0
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
    def free(self) -> bool:
        """Whether it may get a request now, if its weights are the right ones."""
        return (self.reachable and self.unanswered_since is None and not self.resting
                and not (self.quarantined and self.in_flight))

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
        self.failures, self.resting_until = 0, 0.0
        if self.gone.is_set() or not self.reachable:
            self.found()

    def fail_update(self, why: str) -> None:
        """What it holds is unknown; what it was working on goes elsewhere."""
        self.version, self.updating = None, False
        self.failed(why, began=self.update_began)
        self.lost()

    def succeeded(self) -> None:
        self.failures, self.last_failure = 0, ""

    def failed(self, why: str, *, began: float) -> None:
        """Notes a failure.

        Requests that were under way together fail together, so they count once, with the first reason.
        """
        if began < self.failed_at:
            return
        self.last_failure = why
        self.failures += 1
        self.failed_at = time.monotonic()
        self.resting_until = self.failed_at + min(FIRST_REST_S * 2 ** (self.failures - 1), LONGEST_REST_S)

    def lost(self) -> None:
        """Its requests go elsewhere at once."""
        self.reachable = False
        self.gone.set()

    def found(self) -> None:
        self.reachable, self.gone = True, asyncio.Event()
