"""Says so when engine and trainer no longer agree on the tokens that are trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping

_LOG = logging.getLogger(__name__)


def mismatch_alarm(step: int, metrics: Mapping[str, float], limit_nats: float) -> dict[str, float]:
    """{"mismatch/alarm": 1 or 0}: whether mismatch/mean_abs exceeds observe.mismatch_alarm; warns if so."""
    if "mismatch/mean_abs" not in metrics:  # a step without tokens
        return {"mismatch/alarm": 0.0}
    found = metrics["mismatch/mean_abs"]
    alarmed = not found <= limit_nats  # also when it is not a number
    if alarmed:
        _LOG.warning(
            "step %d: log-probabilities of engine and trainer differ by %.3g nats on average, more than "
            "observe.mismatch_alarm=%g: the engine may serve old weights (sync/version, rollout/staleness_max), sample "
            "another distribution (rollout.top_p) or compute in another precision", step, found, limit_nats)
    return {"mismatch/alarm": float(alarmed)}
