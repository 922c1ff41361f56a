"""Responses without a verdict: counted, said, and borne up to a share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from megatron_rl.types import RolloutGroup

_LOG = logging.getLogger(__name__)


class TooManyFailures(RuntimeError):
    """So many responses of a step failed that what is left no longer stands for the step. Names the kinds."""


def bear_failures(groups: Sequence[RolloutGroup], *, what: str, max_fraction: float) -> None:
    """Warns of failed responses; raises TooManyFailures if their share exceeds max_fraction.

    groups: everything that has been collected so far for `what`, such as "step 3".
    """
    scores = [score for group in groups for score in group.scores]
    failed = [score for score in scores if score.failed]
    if not failed:
        return
    details = {score.status: score.detail for score in reversed(failed)}  # the first of each kind
    kinds = "; ".join(f"{count} x {status} ({details[status]})"
                      for status, count in sorted(Counter(score.status for score in failed).items()))
    said = f"{what}: {len(failed)} of {len(scores)} responses failed and train nothing: {kinds}"
    if len(failed) > max_fraction * len(scores):
        raise TooManyFailures(f"{said}. That is more than rollout.max_failed_fraction={max_fraction:g} allows: mend "
                              "what fails, or raise the key")
    _LOG.warning("%s", said)
