"""What srun starts: `slurm_step orchestrator CONFIG.json` once, `slurm_step rank CONFIG.json` on every task of the
trainer, `slurm_step engine CONFIG.json INDEX PLACE HOST`."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from megatron_rl.compat.own_name import check_own_name
from megatron_rl.compat.quick_imports import quick_imports
from megatron_rl.config.load import from_json
from megatron_rl.config.rollout import is_loopback
from megatron_rl.launch.local import engines_for
from megatron_rl.observe import lease
from megatron_rl.observe.files import write_whole
from megatron_rl.orchestrator import __main__ as program
from megatron_rl.signals import STOP_SIGNALS, ignore


def rank(config_path: str) -> None:
    """One rank of the trainer, with Slurm's numbers under the names that torch.distributed reads.

    Slurm signals it too when the job is preempted; it stays until the orchestrator has had it save.
    """
    ignore(STOP_SIGNALS)  # before the slow imports: the signal may come at any time
    with quick_imports():
        from megatron_rl.trainer import main as rl

    check_place(os.environ)
    os.environ |= {"RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": os.environ["SLURM_NTASKS"],
                   "LOCAL_RANK": os.environ["SLURM_LOCALID"]}
    rl.run(from_json(config_path))


def check_place(step: Mapping[str, str]) -> None:
    """ValueError if Slurm gave the nodes of the step unequal numbers of ranks."""
    nodes, ranks = int(step["SLURM_STEP_NUM_NODES"]), int(step["SLURM_STEP_NUM_TASKS"])
    place = (int(step["SLURM_NODEID"]), int(step["SLURM_LOCALID"]))
    if divmod(int(step["SLURM_PROCID"]), ranks // nodes) != place:
        raise ValueError(f"rank {step['SLURM_PROCID']} is number {step['SLURM_LOCALID']} on {socket.gethostname()}, "
                         f"node {step['SLURM_NODEID']} of {nodes}: every node must run {ranks // nodes} ranks "
                         f"(SLURM_STEP_TASKS_PER_NODE={step.get('SLURM_STEP_TASKS_PER_NODE')})")


def orchestrator(config_path: str) -> None:
    """The orchestrator; a preempted job gets SIGTERM, and with it some time to save."""
    program.main(config_path, stop_signals=STOP_SIGNALS)


def engine(config_path: str, index: str, place: str, host: str) -> None:
    """One server until SIGTERM, started again when it fails; its URL goes into engine-INDEX.url when it answers.

    place: its number among those on its node.
    """
    from megatron_rl.orchestrator import stages

    if not is_loopback(host):
        check_own_name(host)
    config = stages.widest(from_json(config_path))
    engines = config.rollout.engine
    options = dataclasses.replace(engines, count=1, host=host, port=None,
                                  first_gpu=engines.first_gpu + int(place) * engines.tp)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=options))
    folder = Path(config_path).parent
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    with engines_for(config, config.model.path, folder / f"engine-{index}.server.log") as served:
        lease.check(config.run.dir)  # a newer start would take this URL for its own engine's
        write_whole(folder / f"engine-{index}.url", served.rollout.engine.urls[0])
        while not over.wait(lease.CHECK_S) and lease.superseded(config.run.dir) is None:
            pass


if __name__ == "__main__":
    {"rank": rank, "engine": engine, "orchestrator": orchestrator}[sys.argv[1]](*sys.argv[2:])
