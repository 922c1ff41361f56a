"""The ranks of a run on a machine without GPUs: `python -m megatron_rl.forked_ranks RANKS PORT MODULE ARGS...`.

One process imports torch and Megatron, which takes seconds, and forks the ranks. Each of them then runs MODULE as
`python -m` would, with the variables that torchrun sets. On GPUs torchrun starts the ranks (launch/local.py), because
a process that has looked for CUDA cannot fork processes that use it.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import connection

import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from megatron_rl.compat.quick_imports import quick_imports
from megatron_rl.train import import_recipes


def main(argv: Sequence[str]) -> None:
    ranks, port, module, *arguments = argv
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    with quick_imports():
        import_recipes()
    started = torch.multiprocessing.start_processes(
        _run_rank, args=(module, arguments), nprocs=int(ranks), join=False, start_method="fork")
    killed: list[int] = []  # before the others were ended
    try:
        while started.sentinels:
            connection.wait(started.sentinels)
            killed = [rank for rank, process in enumerate(started.processes) if process.exitcode == -signal.SIGKILL]
            started.join()
    except (ProcessRaisedException, ProcessExitedException) as failed:
        rank, how = failed.error_index, "failed"
        if killed:  # a rank that lost it may have ended as well, and is what torch names then
            rank = killed[0]
        process = started.processes[rank]
        if killed or isinstance(failed, ProcessExitedException):
            how = f"ended with exitcode: {process.exitcode} "
        sys.exit(f"rank {rank} (pid {process.pid}) {how}; the other ranks were ended with it")


def _run_rank(rank: int, module: str, arguments: Sequence[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:
        traceback.print_exc()  # at once: the log has the first failure first
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
