"""Jobs on a real Slurm of one node: they end, are preempted, stopped and cancelled, and nothing is lost.

Runs as root where Debian's Slurm is installed (cluster.sh says which packages) and starts; elsewhere it skips.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.config.load import load
from megatron_rl.launch.local import rank_environment
from megatron_rl.observe.files import write_whole
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.rollout.engines import EngineProcess
from tests.engine.test_ablations import SHORT
from tests.engine.test_runs import SMALL, rows, timeless, weights_digest

ROOT = Path(__file__).resolve().parents[2]
STATE = Path("/tmp/megatron_rl_slurm")
STEPS = 6
HELD = ("reward.routes.math=tests.rewards.held_brevity", "reward.timeout_s=600")

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(2400),
    pytest.mark.skipif(shutil.which("slurmctld") is None or shutil.which("munged") is None or os.getuid() != 0,
                       reason="needs root and Slurm: apt-get install slurm-wlm slurmctld slurmd slurm-client munge"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    environment = rank_environment() | {"SLURM_CONF": str(STATE / "slurm.conf"), "MEGATRON_RL_SLURM": str(STATE)}
    script = str(Path(__file__).with_name("cluster.sh"))
    said = tmp_path_factory.mktemp("slurm") / "up.log"
    with said.open("w") as log:  # not a pipe, which the daemons could hold open
        up = subprocess.run(["bash", script, "up"], stdout=log, stderr=log, env=environment)
    try:
        if up.returncode:
            pytest.skip(f"Slurm's daemons do not start here: {' | '.join(said.read_text().splitlines()[-3:])}")
        yield environment
        subprocess.run(["scancel", "--user=root"], check=True, env=environment)
    finally:
        subprocess.run(["bash", script, "down"], check=True, env=environment)


@pytest.fixture(scope="module")
def engine_url(model, tmp_path_factory):
    config = load(small(model, tmp_path_factory.mktemp("engine")))
    with EngineProcess.from_config(config.rollout, model, log_path=Path(config.run.dir) / "engine.log") as engine:
        yield engine.base_url


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "init"
    make_random_model(folder, seed=0, num_hidden_layers=2)
    return folder


def slurm(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def small(model: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"run.steps={STEPS}", f"model.path={model}", f"run.dir={run_dir}", "slurm.partition=low",
            "slurm.time_limit=20:00", *more]


def submit(environment, model: Path, run_dir: Path, *more: str) -> str:
    text = slurm(environment, sys.executable, "-m", "megatron_rl.cli", "slurm", *small(model, run_dir, *more))
    return re.search(r"job (\d+);", text).group(1)


def wait_until(true, what: str, timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.3)


def running_in(run_dir: Path) -> list[str]:
    """Command lines of processes that belong to the run."""
    lines = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(run_dir) in line and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            lines.append(line)
    return lines


def allow(run_dir: Path, steps: int) -> None:
    """A run with HELD_RUN in its environment goes so far and waits there (tests/rewards.py: held_brevity)."""
    run_dir.mkdir(exist_ok=True)
    write_whole(run_dir / "allowed", str(steps))


def job_log(run_dir: Path, job: str) -> str:
    path = run_dir / "slurm" / f"job-{job}.log"
    return path.read_text() if path.exists() else ""


def test_a_job_that_is_preempted_and_then_stopped_ends_like_one_that_ran_through(cluster, model, engine_url, tmp_path):
    through, taken = tmp_path / "through", tmp_path / "taken"
    command = [sys.executable, "-m", "megatron_rl.cli", "rl", *small(model, through, *HELD)]
    whole = subprocess.run([*command, f"rollout.engine.urls=[{engine_url}]"], cwd=ROOT, env=cluster,
                           capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr

    allow(taken, 1)
    job = submit(cluster | {"HELD_RUN": str(taken)}, model, taken, *HELD)
    wait_until(lambda: len(rows(taken)) == 1, "the first step")
    slurm(cluster, "sbatch", "--partition=high", "--ntasks=8", f"--output={tmp_path}/high.log", "--wrap=sleep 1")
    wait_until(lambda: re.search(r"PreemptTime=\d", slurm(cluster, "scontrol", "show", "job", job))
               or "back into the queue" in job_log(taken, job), "the preemption")  # when Slurm forgets its time
    allow(taken, 2)  # the step that it is in, after which it saves, if that is in time
    wait_until(lambda: "start 2" in job_log(taken, job), "the start after preemption")
    allow(taken, 3)
    wait_until(lambda: len(rows(taken)) == 3, "a step of the second start")
    slurm(cluster, "scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_until(lambda: "asked to stop" in job_log(taken, job), "the signal")

    def started_again() -> bool:
        allow(taken, len(rows(taken)) + 1)  # the step that it is in; one more if the ranks have not heard of it yet
        return "start 3" in job_log(taken, job)

    wait_until(started_again, "the start after the signal")
    allow(taken, STEPS + 1)  # the evaluation after the last one, too
    wait_until(lambda: job_log(taken, job).endswith("done\n"), "the end")

    assert "saved; back into the queue" in job_log(taken, job)
    assert [timeless(row) for row in rows(taken)] == [timeless(row) for row in rows(through)]
    assert weights_digest(taken) == weights_digest(through)
    wait_until(lambda: not running_in(taken), "the job's processes to go", 240)


def test_cancel_leaves_no_process(cluster, model, tmp_path):
    allow(tmp_path / "run", 1)
    job = submit(cluster | {"HELD_RUN": str(tmp_path / "run")}, model, tmp_path / "run", "rollout.engine.count=2",
                 *HELD)
    wait_until(lambda: rows(tmp_path / "run"), "the first step")
    assert running_in(tmp_path / "run")
    slurm(cluster, "scancel", job)
    wait_until(lambda: not running_in(tmp_path / "run"), "the job's processes to go", 240)
    wait_until(lambda: "JobState=CANCELLED" in slurm(cluster, "scontrol", "show", "job", job), "the job's end", 240)
    assert "back into the queue" not in job_log(tmp_path / "run", job)


def test_a_node_with_a_hardware_fault_is_excluded(cluster, model, tmp_path):
    broken = Path(__file__).with_name("broken_node")
    job = submit(cluster, model, tmp_path, "rollout.engine.urls=[http://127.0.0.1:9]",
                 f"slurm.setup=['export PYTHONPATH={broken}:$PYTHONPATH']")
    wait_until(lambda: "failed: excluded" in job_log(tmp_path, job), "the fault to be noticed")
    successor = re.search(r"excluded; goes on as job (\d+)", job_log(tmp_path, job)).group(1)
    about = slurm(cluster, "scontrol", "show", "job", successor)
    assert f"ExcNodeList={socket.gethostname().split('.')[0]}" in about
    assert "JobState=PENDING" in about
    slurm(cluster, "scancel", successor)


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit: pip install -e '.[slurm]'")
def test_a_multirun_of_two_arms_and_two_seeds_goes_through_submitit(cluster, model, engine_url, tmp_path):
    """One job at a time, since all four train against one engine, whose weights a job begins by replacing."""
    name = "fig7_8_c3po_vs_grpo"
    command = [sys.executable, "-m", "megatron_rl.cli", "ablate", name, "--multirun=submitit_slurm", "seeds=0,1",
               "arms=c3po,grpo", f"out={tmp_path}", f"start={model}", *SHORT, "run.steps=1", "eval.problems=4",
               f'rollout.engine.urls=["{engine_url}"]', "slurm.partition=low", "slurm.time_limit=20:00",
               "slurm.cpus_per_task=8"]
    assert "cannot tell" in slurm(cluster, *command), "two seeds prove nothing"
    folder = tmp_path / name / "tiny"
    assert json.loads((folder / "result.json").read_text())["seeds"] == [0, 1]
    jobs = {path.name.split("_")[1] for path in (folder / "multirun" / ".submitit").rglob("*_submitted.pkl")}
    assert len(jobs) == 4, "each arm and seed was a job of Slurm's own"
    for arm in ("c3po", "grpo"):
        for seed in (0, 1):
            config = json.loads((folder / arm / f"seed_{seed}" / "config.json").read_text())
            assert (config["algo"]["objective"], config["run"]["seed"]) == (arm, seed)
    trained = [path.read_bytes() for path in sorted(folder.rglob("metrics.jsonl"))]
    slurm(cluster, *[word.replace("submitit_slurm", "basic") for word in command])
    assert [path.read_bytes() for path in sorted(folder.rglob("metrics.jsonl"))] == trained, "all were finished"
