"""Says so when engine and trainer no longer agree on the tokens that are trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping

_LOG = logging.getLogger(__name__)


def mismatch_alarm(step: int, metrics: Mapping[str, float], limit_nats: float) -> dict[str, float]:
    """{"mismatch/alarm": 1 or 0}: whether mismatch/mean_abs exceeds observe.mismatch_alarm; warns if so."""
    found = metrics["mismatch/mean_abs"]
    if found > limit_nats:
        _LOG.warning(
            "step %d: log-probabilities of engine and trainer differ by %.3g nats on average, more than "
            "observe.mismatch_alarm=%g: the engine may serve old weights (sync/version, rollout/staleness_max), sample "
            "another distribution (rollout.top_p) or compute in another precision", step, found, limit_nats)
    return {"mismatch/alarm": float(found > limit_nats)}
