"""Runs over three hosts, each with its own address, name, processes and /tmp (lab.py): Slurm's and torchrun's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_rl.config.load import load, to_dict
from megatron_rl.launch.slurm import job_folder, job_script
from megatron_rl.observe.files import write_json, write_whole
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.trainer.client import CUT_OFF
from tests.engine.test_runs import SMALL, rows, weights_digest
from tests.hosts.lab import ROOT, Lab, wait_until, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHORT = [*SMALL, "run.steps=2", "run.save_every_steps=1", "eval.problems=0", "parallel.world_size=2",
         "rollout.publish=broadcast", "slurm.time_limit=20:00", "orchestrator.hang_timeout_s=12"]
HEART = """
import time
from megatron_rl.config.orchestrator import OrchestratorConfig
from megatron_rl.trainer.client import Heartbeat
Heartbeat(OrchestratorConfig(host="n1", port=9, hang_timeout_s=3.0), 1).start()
print("beats", flush=True)
time.sleep(600)
"""
UNSHARED = """
import os, sys
from safetensors.torch import load_file
from megatron_rl.rollout.client import EngineClient
from megatron_rl.sync.disk import DiskPublisher
from megatron_rl.sync.publish import PublishError
engine = EngineClient("http://n3:20500", api_key=os.environ["MEGATRON_RL_ENGINE_KEY"])
publisher = DiskPublisher([engine], bucket_bytes=1 << 30, folder="/tmp/own/published", config_folder=sys.argv[1])
try:
    publisher.publish(load_file(f"{sys.argv[1]}/model.safetensors").items(), 9)
except PublishError as error:
    print(error)
"""
SILENT = """
import socket, time
listening = socket.create_server(("n1", 7777))
print("listens", flush=True)
kept = [listening.accept()]
print("is asked", flush=True)
time.sleep(600)
"""
REQUEST = """
import asyncio, time
from megatron_rl.observe import wires
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineDisconnectedError
wires.IDLE_S, wires.EVERY_S, wires.PROBES = 2, 1, 3
async def ask():
    async with EngineClient("http://n1:7777", timeout_s=600.0) as engine:
        await engine.checksums()
try:
    asyncio.run(ask())
except EngineDisconnectedError as error:
    print("broken", error)
"""
HELD = ("reward.routes.math=tests.rewards.held_brevity", "reward.timeout_s=600")
LAYOUTS = {
    "8 ranks a node, engines apart": (["slurm.nodes=2", "slurm.engine_nodes=1", "parallel.world_size=16",
                                       "rollout.engine.count=3"], {"n1": 8, "n2": 8}, {"n3": 3}),
    "8 ranks, 3 engines apart": (["slurm.engine_nodes=1", "parallel.world_size=8", "rollout.engine.count=3"],
                                 {"n1": 8}, {"n2": 3}),
    "4 ranks on 2 nodes beside an engine": (["slurm.nodes=2", "parallel.world_size=4"], {"n1": 2, "n2": 2}, {"n1": 1}),
    "more engine nodes than trainer nodes": (["slurm.engine_nodes=2", "parallel.world_size=2",
                                              "rollout.engine.count=4"], {"n1": 2}, {"n2": 2, "n3": 2}),
    "engines of somebody else": (["slurm.nodes=3", "parallel.world_size=6", "rollout.engine.urls=[http://n9:1]"],
                                 {"n1": 2, "n2": 2, "n3": 2}, {}),
}


@pytest.fixture(scope="module")
def lab():
    if why := why_not():
        pytest.skip(why)
    shared = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    try:
        with Lab(shared, hosts=4) as lab:
            lab.name_like_debian("n4")
            make_random_model(shared / "model", seed=0, num_hidden_layers=2)
            yield lab
    finally:
        shutil.rmtree(shared)


@pytest.fixture(scope="module")
def cluster(lab):
    if why := why_not(slurm=True):
        pytest.skip(why)
    lab.start_slurm(control="n3")
    return lab


def short(lab: Lab, run: str, *more: str) -> list[str]:
    return [*SHORT, f"model.path={lab.shared}/model", f"run.dir={lab.shared}/{run}", *more]


def submit(lab: Lab, run: str, *more: str, **environment: str) -> str:
    lab.wait_for_idle("n3")
    said = lab.run("n1", sys.executable, "-m", "megatron_rl.cli", "slurm", *short(lab, run, *more),
                   environment=environment)
    return re.search(r"job (\d+);", said).group(1)


def job_log(lab: Lab, run: str, job: str) -> str:
    path = lab.shared / run / "slurm" / f"job-{job}.log"
    return path.read_text() if path.exists() else ""


def allow(folder: Path, steps: int) -> None:
    """How far a run with HELD_RUN=folder may go (tests/rewards.py: held_brevity). It reads the file all the time."""
    write_whole(folder / "allowed", str(steps))


def wait_for_end(lab: Lab, run: str, job: str, words: str = "done\n") -> str:
    def over() -> bool:
        state = lab.run("n3", "squeue", "-h", "-j", job, "-t", "all", "-o", "%T")
        return words in job_log(lab, run, job) or not state.startswith(("PENDING", "CONFIGURING", "RUNNING"))

    wait_until(over, f"job {job} to end", 300)
    return job_log(lab, run, job)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_node_gets_equally_many_ranks_and_its_engines(cluster, name):
    overrides, ranks, engines = LAYOUTS[name]
    run = f"layout-{list(LAYOUTS).index(name)}"
    config = load(short(cluster, run, *overrides))
    folder = job_folder(config)
    folder.mkdir(parents=True)
    write_json(folder / "launch.json", to_dict(config))
    *script, _ = job_script(config).strip().splitlines()
    (folder / "job.sh").write_text("\n".join([*script, f"exec {sys.executable} {ROOT}/tests/hosts/layout_of_a_job.py "
                                                       f"{folder}/launch.json", ""]))
    cluster.wait_for_idle("n3")
    job = cluster.run("n1", "sbatch", "--parsable", f"{folder}/job.sh").strip()
    wait_until(lambda: re.search(r"codes .*\n", job_log(cluster, run, job)), "the layout", 300)
    assert set(json.loads(job_log(cluster, run, job).split("codes ")[1])) == {0}, job_log(cluster, run, job)
    said = [line.split() for path in folder.glob("*.log") for line in path.read_text().splitlines()
            if line.startswith(("rank ", "engine-"))]
    placed = sorted((int(rank), int(local), host) for kind, rank, local, host in said if kind == "rank")
    assert Counter(host for _, _, host in placed) == ranks
    per_node = len(placed) // len(ranks)
    assert [(rank, local) for rank, local, _ in placed] == [(rank, rank % per_node) for rank in range(len(placed))]
    assert Counter(host for kind, _, _, host in said if kind.startswith("engine")) == engines


def test_a_slurm_job_over_two_hosts_with_an_engine_on_the_third_and_none_on_a_fourth(cluster):
    """n4's own name is 127.0.1.1 there, so its engine does not start, and is not waited for."""
    job = submit(cluster, "job", "slurm.nodes=2", "slurm.engine_nodes=2", "rollout.engine.count=2")
    said = wait_for_end(cluster, "job", job)
    assert said.endswith("done\n"), said
    assert "trainers on n1,n2, engines on n3,n4" in said
    assert re.search(r"engine 1 on n4 ended with exit code 1 before it answered: .*n4 is 127.0.1.1 on itself", said)
    assert "the run goes on with 1 of rollout.engine.count=2 engines" in said
    found = rows(cluster.shared / "job")
    assert [row["sync/version"] for row in found] == [1, 2] and all(row["sync/engines_verified"] == 1 for row in found)


def test_nodes_that_do_not_share_the_folder_are_named(cluster):
    folder = "/tmp/run"  # each host's own
    cluster.wait_for_idle("n3")  # the job gets n1, where its log is looked for
    said = cluster.run("n1", sys.executable, "-m", "megatron_rl.cli", "slurm", *short(cluster, "job"),
                       f"run.dir={folder}", "slurm.nodes=2")
    job = re.search(r"job (\d+);", said).group(1)
    wait_until(lambda: cluster.run("n1", "bash", "-c", f"cat {folder}/slurm/job-{job}.log || true").count("\n") > 1,
               "the job's words")
    said = cluster.run("n1", "cat", f"{folder}/slurm/job-{job}.log")
    assert f"n2 does not see {folder}/slurm/launch.json: run.dir" in said and "n1 does not" not in said


def test_a_start_that_slurm_has_lost_ends_when_the_job_starts_again_elsewhere(cluster):
    """n1 loses the controller and keeps the file system: its ranks, engine and orchestrator would go on."""
    folder = cluster.shared / "lost"
    folder.mkdir()
    allow(folder, 1)
    job = submit(cluster, "lost", *HELD, HELD_RUN=str(folder))
    wait_until(lambda: len(rows(folder)) == 1, "the first step", 300)
    assert "trainers on n1," in job_log(cluster, "lost", job)
    assert cluster.processes_of("n1", str(folder))
    cluster.cut("n1")
    try:
        wait_until(lambda: "PENDING" in cluster.run("n3", "squeue", "-h", "-j", job, "-o", "%T"), "the requeue", 300)
        cluster.run("n3", "scontrol", "update", f"JobId={job}", "StartTime=now")
        wait_until(lambda: "it is told to end" in job_log(cluster, "lost", job), "the second start", 300)
        told = time.monotonic()
        wait_until(lambda: not cluster.processes_of("n1", str(folder)), "the first start to end")
        print(f"nothing of the older start was left {time.monotonic() - told:.0f} s after the newer one began")
        allow(folder, 9)
        said = wait_for_end(cluster, "lost", job)
    finally:
        cluster.heal("n1")
    assert said.endswith("done\n") and "start 2, trainers on n2," in said, said
    assert re.search(r"start \d of the run, on n2 since .* has taken run.dir", said)
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert weights_digest(folder) == weights_digest(cluster.shared / "job"), "a run that nothing happened to"


def test_torchrun_by_hand_over_two_hosts_and_one_is_cut_off(lab):
    """Engine on n3, weights through the disk. n2's cable is cut in the third step; healed, the run goes on."""
    overrides = short(lab, "hand", "run.steps=4", "rollout.publish=disk", *HELD)
    key = {"HELD_RUN": f"{lab.shared}/hand", "MEGATRON_RL_ENGINE_KEY": "of the lab"}
    rl = [sys.executable, "-m", "megatron_rl.cli"]
    (lab.shared / "hand").mkdir()
    allow(lab.shared / "hand", 2)
    lab.start("n3", *rl, "engine", *overrides, "rollout.engine.host=n3", "rollout.engine.port=20500",
              log=lab.shared / "engine.said", environment=key)
    wait_until(lambda: "http://n3:20500" in read(lab.shared / "engine.said"), "the engine", 200)

    listening = [line.split()[3] for line in lab.run("n3", "ss", "-Hltnp").splitlines() if "slurm" not in line]
    assert listening and not [place for place in listening if not place.startswith((lab.address("n3"), "127."))]

    def start(*more: str) -> list[subprocess.Popen]:
        script = lab.shared / "hand" / "torchrun.sh"
        launcher = lab.start("n1", *rl, "torchrun", "--nodes", "2", *overrides, "rollout.engine.urls=[http://n3:20500]",
                             *more, log=lab.shared / "launcher.said", environment=key)
        wait_until(lambda: script.exists() or launcher.poll() is not None, "the script")
        assert launcher.poll() is None, read(lab.shared / "launcher.said")
        assert script.stat().st_mode & 0o077 == 0, "it holds keys"
        return [launcher, *(lab.start(host, "bash", str(script), number, log=lab.shared / f"{host}.said")
                            for host, number in (("n1", "0"), ("n2", "1")))]

    processes = start()
    wait_until(lambda: len(rows(lab.shared / "hand")) == 2, "two steps", 300)
    lab.cut("n2")
    cut = time.monotonic()
    for process in processes:
        assert process.wait(180) != 0
    print(f"all programs had ended {time.monotonic() - cut:.0f} s after the cable was cut")
    assert re.search(r"rank 1 \(pid \d+ on n2\) of the trainer hangs", read(lab.shared / "launcher.said"))
    assert "was ended on n1" in read(lab.shared / "n1.said") and "was ended on n1" in read(lab.shared / "n2.said")
    lab.heal("n2")
    allow(lab.shared / "hand", 9)
    for process in start("resume=true"):
        assert process.wait(300) == 0, read(lab.shared / "launcher.said")
    assert [row["step"] for row in rows(lab.shared / "hand")] == [1, 2, 3, 4]
    assert not (lab.shared / "hand" / "torchrun.sh").exists(), "its keys are void"
    said = lab.run("n1", sys.executable, "-c", UNSHARED, f"{lab.shared}/model", environment=key)
    assert ("http://n3:20500 does not see /tmp/own/published/version_9: rollout.publish=disk needs a run.dir that the "
            "engine's machine shares") in said, said


def test_a_cut_cable_breaks_requests_and_ends_a_rank_without_a_way_to_the_orchestrator(lab):
    """Whatever its main thread waits for. A refusal is no cut: the orchestrator may be started again."""
    lab.start("n1", sys.executable, "-c", SILENT, log=lab.shared / "silent.said")
    wait_until(lambda: "listens" in read(lab.shared / "silent.said"), "the server")
    request = lab.start("n2", sys.executable, "-c", REQUEST, log=lab.shared / "request.said")
    rank = lab.start("n2", sys.executable, "-c", HEART, log=lab.shared / "heart.said",
                     environment={"MEGATRON_RL_RUN_KEY": "k"})
    wait_until(lambda: "beats" in read(lab.shared / "heart.said"), "the heart")
    wait_until(lambda: "is asked" in read(lab.shared / "silent.said"), "the request")
    time.sleep(6)  # longer than either bears a cut
    assert rank.poll() is None and request.poll() is None
    lab.cut("n1")
    try:
        assert rank.wait(180) == CUT_OFF
        assert request.wait(180) == 0 and "broken POST http://n1:7777" in read(lab.shared / "request.said")
    finally:
        lab.heal("n1")
    assert "n2 has had no way to n1, the machine of the orchestrator" in read(lab.shared / "heart.said")


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
