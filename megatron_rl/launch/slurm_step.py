"""What srun starts: `slurm_step rank CONFIG.json` on every task, `slurm_step engine CONFIG.json INDEX PLACE HOST`."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path

from megatron_rl.compat.quick_imports import quick_imports
from megatron_rl.config.load import from_json
from megatron_rl.launch.local import engines_for
from megatron_rl.observe.files import write_whole


def rank(config_path: str) -> None:
    """One rank of the RL recipe, with Slurm's numbers under the names that torch.distributed reads."""
    from megatron_rl.recipes import stop

    stop.listen((signal.SIGUSR1, signal.SIGTERM))  # SIGTERM: preempted. Before the slow imports: it may come any time
    with quick_imports():
        from megatron_rl.recipes import rl

    os.environ |= {"RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": os.environ["SLURM_NTASKS"],
                   "LOCAL_RANK": os.environ["SLURM_LOCALID"]}
    if not rl.run(from_json(config_path)):  # the next stage is another start of this job
        stop.leave()


def engine(config_path: str, index: str, place: str, host: str) -> None:
    """One server until SIGTERM, started again when it fails; its URL goes into engine-INDEX.url when it answers.

    place: its number among those on its node.
    """
    from megatron_rl.recipes import stages

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
        write_whole(folder / f"engine-{index}.url", served.rollout.engine.urls[0])
        over.wait()


if __name__ == "__main__":
    {"rank": rank, "engine": engine}[sys.argv[1]](*sys.argv[2:])
