"""Responses without a verdict: counted, said, and borne up to a share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from megatron_rl.types import RolloutGroup

LONGEST_MESSAGE = 500
"""Characters of what code that is not ours says of its failure."""

_LOG = logging.getLogger(__name__)


def told(error: BaseException) -> str:
    """`Type: message` of an error that was raised by code that is not ours: short, printable and UTF-8."""
    try:
        message = str(error)
    except Exception as other:  # noqa: BLE001 -- it is the user's code that raises, as before
        message = f"its message could not be had ({type(other).__name__})"
    return as_utf8(f"{type(error).__name__}: {message[:LONGEST_MESSAGE]}")


def as_utf8(text: str) -> str:
    """The text, with escapes for what UTF-8 cannot say."""
    return text.encode(errors="backslashreplace").decode()


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
