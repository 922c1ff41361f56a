"""megatron-core 0.19.2: synchronous checkpoint writing without a manager process.

dist_checkpointing.strategies.filesystem_async.get_write_results_queue starts a multiprocessing.Manager in every
rank at the first save (seconds), only to pass results between threads of the same process; a rank that is killed
leaves it behind. A queue of this process does the same. Asynchronous saving, which forks, would need the manager.

Delete when: Megatron creates that queue only for asynchronous saves.
"""

from __future__ import annotations

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async

WRITTEN_FOR = "0.19.2"


def keep_write_results_in_process() -> None:
    """Call before the first dist_checkpointing.save of this process."""
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
