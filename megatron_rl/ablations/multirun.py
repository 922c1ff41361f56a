"""The runs of an ablation as a Hydra multirun, one job for each arm and seed; `-m megatron_rl.ablations.multirun` is
the Hydra application.

Every job runs its arm at its seed as `megatron-rl ablate` does on one machine, with an engine of its own. launcher
basic: one after the other, here. submitit_slurm: jobs of Slurm, of one node each, described by section slurm. A run
that needs several nodes is `ablate --slurm`'s.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from megatron_rl.ablations.driver import Plan
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.launch.local import RunFailed, rank_environment
from megatron_rl.observe.files import write_json

REQUEST = "request.json"


def multirun(launcher: str, name: str, settings: Sequence[str], todo: Plan) -> None:
    """Run every job and wait for the last. RunFailed when one fails; what they left, the same command goes on from.

    settings: as given to `ablate`; each job adds its arm and its seed. The supervised starts are finished.
    ValueError: submitit is not installed.
    """
    folder = (todo.root / "multirun").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REQUEST, {"name": name, "settings": list(settings)})
    product = [f"+{key}={','.join(dict.fromkeys(str(getattr(run, key)) for run in todo.runs))}"
               for key in ("arm", "seed")]
    command = [sys.executable, "-m", "megatron_rl.ablations.multirun", "--multirun", *product,
               f"+request='{folder / REQUEST}'", f"hydra/launcher={launcher}", f"hydra.sweep.dir='{folder}'",
               "hydra.sweep.subdir=${arm}_seed_${seed}", *resources(launcher, todo.runs[0].config)]
    if subprocess.run(command, env=rank_environment()).returncode:
        raise RunFailed(f"a job of the multirun failed; their logs: {folder}; the same command goes on with what is "
                        "not finished")


def resources(launcher: str, config: Config) -> list[str]:
    """Section slurm as the launcher takes it. ValueError without submitit, or where one node cannot hold the run."""
    if launcher == "basic":
        return []
    require(importlib.util.find_spec("submitit") is not None,
            f"--multirun={launcher} needs submitit: pip install -e '.[slurm]'")
    slurm, engine = config.slurm, config.rollout.engine
    require(slurm.nodes == 1 and slurm.engine_nodes == 0,
            f"slurm.nodes={slurm.nodes}, slurm.engine_nodes={slurm.engine_nodes}: a job of --multirun is one node; "
            "runs of several nodes are submitted by --slurm")
    processes = config.parallel.world_size + (0 if engine.urls else engine.count)
    keys = {"timeout_min": minutes(slurm.time_limit), "cpus_per_task": processes * slurm.cpus_per_task,
            "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "exclude": slurm.exclude,
            "gpus_per_node": slurm.gpus_per_node or None, "signal_delay_s": slurm.signal_lead_s,
            "max_num_timeout": slurm.max_restarts, "setup": list(slurm.setup) or None}
    return [f"hydra.launcher.{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]


def minutes(time_limit: str) -> int:
    """The minutes of a time limit in one of Slurm's forms.

    These are minutes, minutes:seconds, hours:minutes:seconds and days-hours[:minutes[:seconds]].
    """
    days, dash, clock = time_limit.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        hours, mins, seconds = ([*parts, 0, 0] if dash or len(parts) == 3 else [0, *parts, 0])[:3]
        return -(-(int(days or 0) * 86400 + hours * 3600 + mins * 60 + seconds) // 60)
    except ValueError:
        raise ValueError(f"slurm.time_limit={time_limit} is not a time that Slurm knows, "
                         "like 24:00:00 or 2-00:00:00") from None


@hydra.main(version_base="1.3", config_path=None)
def job(config: DictConfig) -> None:
    from rich.console import Console

    from megatron_rl.ablations.command import planned
    from megatron_rl.ablations.driver import run_all

    GlobalHydra.instance().clear()  # the run's own configuration is composed by Hydra too
    request = json.loads(Path(config.request).read_text())
    todo = planned(request["name"], [*request["settings"], f"arms={config.arm}", f"seeds={config.seed}"])
    run_all(todo.ablation, todo.plan, Console())


if __name__ == "__main__":
    job()
