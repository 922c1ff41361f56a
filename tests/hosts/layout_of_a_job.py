"""Stands in for a job: starts a program where the job would start each rank and engine; it only says where it is."""

import sys
from pathlib import Path

from megatron_rl.launch.slurm_job import Job, place_on

SAY = ["bash", "-c", 'echo "$0 $SLURM_PROCID $SLURM_LOCALID $(hostname)"']

job = Job(Path(sys.argv[1]))
engines = [] if job.config.rollout.engine.urls else range(job.config.rollout.engine.count)
steps = [job.step(f"engine-{index}", place_on(job.engine_host(index)), [*SAY, f"engine-{index}"]) for index in engines]
steps.append(job.step("rank", job.place_of_ranks(), [*SAY, "rank"]))  # while the engines' steps last
print("codes", [step.wait() for step in steps], flush=True)
