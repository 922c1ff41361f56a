"""`megatron-rl slurm`: writes a batch job for one RL run and submits it. What the job does: slurm_job.py.

One allocation holds trainer ranks and engines; no Ray, no service outside the job. Everything the job writes lies in
<run.dir>/slurm/: job.sh, launch.json, job-*.log, rank-*.log, engine-*.log.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_rl.compat.cuda import SAME_IN_RANKS_AND_ENGINES
from megatron_rl.config.load import to_dict
from megatron_rl.config.schema import Config, require
from megatron_rl.launch.local import check_disk, rank_environment
from megatron_rl.observe.files import write_json, write_whole

CARRIED = ("PYTHONPATH", "TORCHDYNAMO_DISABLE", "HF_HUB_OFFLINE", "PYTHONWARNINGS", "TORCH_CPP_LOG_LEVEL",
           "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", *SAME_IN_RANKS_AND_ENGINES)
"""The part of rank_environment() that the job needs besides what Slurm gives it."""


def job_folder(config: Config) -> Path:
    return Path(config.run.dir).resolve() / "slurm"


def job_script(config: Config) -> str:
    """The text of job.sh. ValueError when the ranks cannot be laid out evenly over slurm.nodes, or not publish."""
    slurm, world = config.slurm, config.parallel.world_size
    require(world % slurm.nodes == 0,
            f"slurm.nodes={slurm.nodes} does not divide parallel.world_size={world}: nodes run equally many ranks")
    one_node = slurm.engine_nodes == 0 and (slurm.nodes == 1 or config.rollout.engine.count == 1)
    require(one_node or bool(config.rollout.engine.urls) or config.rollout.publish != "tensor",
            "rollout.publish=tensor goes through shared memory, which engines on other nodes do not have "
            f"(slurm.nodes={slurm.nodes}, slurm.engine_nodes={slurm.engine_nodes}): choose broadcast or disk")
    folder = job_folder(config)
    directives = {
        "job-name": config.run.name, "output": folder / "job-%j.log", "open-mode": "append",
        "nodes": slurm.nodes + slurm.engine_nodes, "ntasks": world + config.rollout.engine.count,
        "time": slurm.time_limit,
        "cpus-per-task": slurm.cpus_per_task, "signal": f"B:USR1@{slurm.signal_lead_s}",
        "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "exclude": slurm.exclude,
        "gpus-per-node": slurm.gpus_per_node or None,
    }
    lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in directives.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {text}" for text in slurm.extra)]
    environment = rank_environment()
    exports = [f"export {name}={shlex.quote(environment[name])}" for name in CARRIED if name in environment]
    driver = shlex.join([sys.executable, "-m", "megatron_rl.launch.slurm_job", str(folder / "launch.json")])
    return "\n".join(["#!/bin/bash", *lines, "set -e", f"cd {shlex.quote(str(Path.cwd()))}", *exports, *slurm.setup,
                      f"exec {driver}", ""])


def submit(config: Config, *, dry_run: bool) -> str:
    """The job's id, or with dry_run the script alone (nothing is written). ValueError where Slurm is not installed."""
    script = job_script(config)
    if dry_run:
        return script
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not on this machine: submit from a login node of the cluster, or use --dry-run")
    check_disk(Path(config.run.dir))
    folder = job_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "launch.json", to_dict(config))
    write_whole(folder / "job.sh", script)
    done = subprocess.run(["sbatch", "--parsable", str(folder / "job.sh")], capture_output=True, text=True)
    require(done.returncode == 0, f"sbatch refused {folder / 'job.sh'}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
