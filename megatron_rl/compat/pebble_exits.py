"""A worker of a pebble.ProcessPool that ends in the middle of a task is noticed at once, whatever its exit code.

Written for pebble 5.2.3, where pool/process.py (WorkerManager.inspect_workers) reports no worker that ends with code 0,
as after os._exit(0) in a task: the task then waits for its time limit. Delete when pebble reports them.
"""

from __future__ import annotations

import functools

import pebble


def notice_every_exit(pool: pebble.ProcessPool) -> pebble.ProcessPool:
    """The same pool, not yet started. Not for one with max_tasks, whose workers end with code 0 when they are done."""
    manager = pool._pool_manager.worker_manager
    manager.inspect_workers = functools.partial(_ended, manager)
    return pool


def _ended(manager) -> tuple[tuple[int, int], ...]:
    """(process id, exit code) of the workers that have ended; they are workers no more."""
    ended = [worker for worker in list(manager.workers.values()) if not worker.is_alive()]
    for worker in ended:
        manager.workers.pop(worker.pid, None)
    return tuple((worker.pid, worker.exitcode) for worker in ended)
