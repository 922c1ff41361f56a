"""What a run measures and where it goes. A leaf: anything above types and config may use it.

`report` is imported by its full name only if a report is written.
"""

from megatron_rl.observe.metrics import reduce_maxima, reduce_metrics
from megatron_rl.observe.progress import RunProgress
from megatron_rl.observe.sinks import MetricsLog
from megatron_rl.observe.timing import Timers

__all__ = ["MetricsLog", "RunProgress", "Timers", "reduce_maxima", "reduce_metrics"]
