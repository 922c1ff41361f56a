"""`megatron-rl slurm`: writes a batch job for one RL run and submits it. What the job does: slurm_job.py.

One allocation holds trainer ranks and engines; no Ray, no service outside the job. Everything the job writes lies in
<run.dir>/slurm/: job.sh, launch.json, job-*.log, rank-*.log, engine-*.log.
"""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_rl.compat.cuda import SAME_IN_RANKS_AND_ENGINES
from megatron_rl.config.load import to_dict
from megatron_rl.config.schema import Config, require
from megatron_rl.launch.hosts import check_tensor
from megatron_rl.launch.local import check_disk, rank_environment
from megatron_rl.observe.files import write_json, write_whole

CARRIED = ("PYTHONPATH", "TORCHDYNAMO_DISABLE", "HF_HUB_OFFLINE", "PYTHONWARNINGS", "TORCH_CPP_LOG_LEVEL",
           "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", *SAME_IN_RANKS_AND_ENGINES)
"""The part of rank_environment() that the job needs besides what Slurm gives it."""


def job_folder(config: Config) -> Path:
    return Path(config.run.dir).resolve() / "slurm"


def job_script(config: Config) -> str:
    """The text of job.sh. ValueError if ranks and engines cannot be laid out evenly over the nodes, or not publish."""
    slurm = config.slurm
    tasks_per_node = max(_tasks_per_node(config))
    one_node = slurm.engine_nodes == 0 and (slurm.nodes == 1 or config.rollout.engine.count == 1)
    check_tensor(config, lambda _: False)  # nobody knows yet which nodes the job gets
    require(one_node or bool(config.rollout.engine.urls) or config.rollout.publish != "tensor",
            "rollout.publish=tensor goes through shared memory, which engines on other nodes do not have "
            f"(slurm.nodes={slurm.nodes}, slurm.engine_nodes={slurm.engine_nodes}): choose broadcast or disk")
    folder = job_folder(config)
    directives = {
        "job-name": config.run.name, "output": folder / "job-%j.log", "open-mode": "append",
        "nodes": slurm.nodes + slurm.engine_nodes, "ntasks-per-node": tasks_per_node,
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


def _tasks_per_node(config: Config) -> tuple[int, int]:
    """(tasks of a node with ranks, of one with engines alone). Slurm gives all nodes of a job the same number.

    ValueError where a node would lack ranks, engines or GPUs that another one has.
    """
    slurm, engine, world = config.slurm, config.rollout.engine, config.parallel.world_size
    require(world % slurm.nodes == 0,
            f"slurm.nodes={slurm.nodes} does not divide parallel.world_size={world}: nodes run equally many ranks")
    require(slurm.engine_nodes == 0 or not engine.urls,
            f"slurm.engine_nodes={slurm.engine_nodes}, but the engines of rollout.engine.urls run already: set it to 0")
    engines = 0 if engine.urls else engine.count
    require(slurm.engine_nodes <= engines or bool(engine.urls),
            f"slurm.engine_nodes={slurm.engine_nodes} for rollout.engine.count={engines}: a node would run no engine")
    ranks_per_node = world // slurm.nodes
    engines_per_node = math.ceil(engines / (slurm.engine_nodes or slurm.nodes))
    if slurm.gpus_per_node:
        require(ranks_per_node <= slurm.gpus_per_node,
                f"parallel.world_size={world} on slurm.nodes={slurm.nodes} is {ranks_per_node} ranks a node, and "
                f"slurm.gpus_per_node={slurm.gpus_per_node}: every rank needs a GPU")
        require(engine.device == "cpu" or engine.first_gpu + engines_per_node * engine.tp <= slurm.gpus_per_node,
                f"rollout.engine.count={engines} engines of rollout.engine.tp={engine.tp} GPUs are {engines_per_node} "
                f"on a node, from rollout.engine.first_gpu={engine.first_gpu} on, and slurm.gpus_per_node="
                f"{slurm.gpus_per_node}: give them more nodes (slurm.engine_nodes)")
    if slurm.engine_nodes:
        return ranks_per_node, engines_per_node
    return ranks_per_node + engines_per_node, 0


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
