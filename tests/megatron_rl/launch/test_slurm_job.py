"""What the ranks of a Slurm job are told of its engines."""

import contextlib
import os
import shlex
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config.load import load, to_dict
from megatron_rl.config.rollout import ENGINE_KEY
from megatron_rl.config.schema import Config
from megatron_rl.launch import slurm_step
from megatron_rl.launch.slurm import job_script
from megatron_rl.launch.slurm_job import Job, master_ports, with_engines
from megatron_rl.launch.slurm_step import check_place
from megatron_rl.observe import lease
from megatron_rl.observe.files import write_json
from megatron_rl.rollout.engine_command import draw_key
from megatron_rl.rollout.ports import PORTS, choose_port


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.setenv(ENGINE_KEY, "")  # so that whatever is set below is undone
    monkeypatch.delenv(ENGINE_KEY)


@pytest.mark.parametrize("host", ["127.0.0.1", "node1"])
def test_engines_get_one_key_for_the_run_in_the_environment(host):
    engine = replace(Config().rollout.engine, host=host)
    draw_key(engine)
    key = os.environ[ENGINE_KEY]
    ranks = with_engines(Config(), (f"http://{host}:20001",), resume=False)
    assert ranks.rollout.engine.api_key_env == ENGINE_KEY
    assert len(key) == 64 and key not in repr(ranks)
    draw_key(engine)
    assert os.environ[ENGINE_KEY] == key


def test_no_key_is_drawn_where_the_user_names_one():
    draw_key(replace(Config().rollout.engine, api_key_env="MINE"))
    assert ENGINE_KEY not in os.environ


def test_rank_0_listens_where_no_engine_may_and_neighbouring_jobs_do_not():
    ports = [master_ports(str(job))[0] for job in range(4_000_000, 4_002_000)]
    assert len(set(ports)) == len(ports) and not set(ports) & set(PORTS)
    assert 1024 <= min(ports) and max(ports) < 32768


@pytest.mark.parametrize("elsewhere", [["slurm.engine_nodes=1"], ["slurm.nodes=2", "rollout.engine.count=2"]])
def test_shared_memory_to_engines_on_other_nodes_is_refused(elsewhere):
    with pytest.raises(ValueError, match="rollout.publish=tensor goes through shared memory"):
        job_script(load(["experiment=quickstart", "rollout.publish=tensor", *elsewhere]))
    job_script(load(["experiment=quickstart", "rollout.publish=broadcast", *elsewhere]))
    job_script(load(["experiment=quickstart", "rollout.publish=tensor", "slurm.nodes=2"]))  # one engine, beside rank 0


@pytest.mark.parametrize("nodes", [1, 2])
def test_shared_memory_to_engines_that_run_already_is_refused_unless_they_are_beside_rank_0(nodes):
    tensor = ["experiment=quickstart", "rollout.publish=tensor", f"slurm.nodes={nodes}"]
    with pytest.raises(ValueError, match="http://n9:1 of rollout.engine.urls leads to another: choose broadcast or"):
        job_script(load([*tensor, "rollout.engine.urls=[http://127.0.0.1:1,http://n9:1]"]))
    job_script(load([*tensor, "rollout.engine.urls=[http://127.0.0.1:1]"]))


def test_names_with_blanks_reach_sbatch_whole(tmp_path):
    run_dir = tmp_path / "my runs"
    text = job_script(load(["experiment=quickstart", "run.name='a b'", f"run.dir='{run_dir}'"]))
    directives = [shlex.split(line) for line in text.splitlines() if line.startswith("#SBATCH")]
    assert ["#SBATCH", "--job-name=a b"] in directives
    assert ["#SBATCH", f"--output={run_dir}/slurm/job-%j.log"] in directives


@pytest.mark.parametrize(("overrides", "told"), [
    (["slurm.nodes=3"], "slurm.nodes=3 does not divide parallel.world_size=4"),
    (["slurm.engine_nodes=2"], "slurm.engine_nodes=2 for rollout.engine.count=1: a node would run no engine"),
    (["slurm.engine_nodes=1", "rollout.engine.urls=[http://n9:1]"], "rollout.engine.urls run already: set it to 0"),
    (["slurm.gpus_per_node=2", "slurm.engine_nodes=1"], "is 4 ranks a node, and slurm.gpus_per_node=2"),
    (["slurm.gpus_per_node=4", "slurm.engine_nodes=1", "rollout.engine.count=5"], "engines of rollout.engine.tp=1"),
])
def test_a_layout_that_gives_a_node_too_much_or_nothing_is_refused(overrides, told):
    with pytest.raises(ValueError, match=told):
        job_script(load(["experiment=quickstart", "parallel.world_size=4", "rollout.publish=broadcast", *overrides]))


def step(rank: int, node: int, local: int, *, ranks: int = 16, nodes: int = 2) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local),
            "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NUM_TASKS": str(ranks)}


def test_a_rank_checks_that_nodes_run_equally_many():
    for rank in range(16):
        check_place(step(rank, rank // 8, rank % 8))
    with pytest.raises(ValueError, match="rank 2 is number 2 on .*, node 0 of 2: every node must run 2 ranks"):
        check_place(step(2, 0, 2, ranks=4))  # 3 + 1


def pretend_slurm(tmp_path: Path, monkeypatch, **commands: str) -> None:
    """Programs of these names that do what the lines of bash say, and the environment of job 7."""
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")


@pytest.mark.parametrize(("preempted", "code"), [("2026-11-29T12:00:00", 0), ("None", 1)])
def test_a_job_that_is_preempted_before_its_engines_answer_goes_back_into_the_queue(
        preempted, code, tmp_path, monkeypatch, capsys):
    """Preemption ends the engines. A job that then ends by itself would not be started again."""
    monkeypatch.setenv(lease.START_NUMBER, "")  # so that it is undone
    pretend_slurm(tmp_path, monkeypatch, srun="exit 1", scontrol=f"""
        case "$1 $2" in
            "show hostnames") echo n1 ;;
            "show job") echo PreemptTime={preempted} ;;
            "requeue 7") touch {tmp_path}/requeued ;;
        esac""")
    (tmp_path / "slurm").mkdir()
    write_json(tmp_path / "slurm" / "launch.json", to_dict(load([
        "experiment=quickstart", f"run.dir={tmp_path}", "slurm.nodes=1"])))
    handler = signal.getsignal(signal.SIGUSR1)
    try:
        assert Job(tmp_path / "slurm" / "launch.json").run() == code
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert "no engine could be started" in capsys.readouterr().out
    assert (tmp_path / "requeued").exists() == (code == 0)


@pytest.mark.parametrize(("srun", "told"), [
    ("echo welcome", None),
    ("echo welcome; echo n2 does not see /a", "^n2 does not see /a: run.dir and model.path"),
    ("echo Invalid account >&2; exit 1", "srun could not look at the folders on n1,n2: Invalid account"),
])
def test_the_look_at_the_folders_hears_the_nodes_and_not_the_clusters_greeting(srun, told, tmp_path, monkeypatch):
    """It is taken where ranks and engines will run, which is inside the container."""
    pretend_slurm(tmp_path, monkeypatch, scontrol="echo n1 n2", srun=f'echo "$@" >{tmp_path}/asked; {srun}')
    write_json(tmp_path / "launch.json", to_dict(load([
        "experiment=quickstart", "slurm.nodes=2", "parallel.world_size=2", "slurm.container=apptainer",
        "slurm.container_image=rl.sif", "slurm.container_mounts=[/data:/data]"])))
    with contextlib.nullcontext() if told is None else pytest.raises(SystemExit, match=told):
        Job(tmp_path / "launch.json").check_shared()
    assert "--nodelist=n1,n2 apptainer exec --bind=/data:/data rl.sif bash -c" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize("overtaken", [False, True])
def test_an_engine_of_an_older_start_gives_no_url_to_the_newer_one(overtaken, tmp_path, monkeypatch):
    """It may answer only after the newer start has begun to wait for its own engines."""
    monkeypatch.setenv(lease.START_NUMBER, "")  # so that it is undone
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    lease.take(tmp_path)
    ours, ending = os.environ[lease.START_NUMBER], threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM])

    @contextlib.contextmanager
    def engines_for(config, *_):
        if overtaken:
            lease.take(tmp_path)
            monkeypatch.setenv(lease.START_NUMBER, ours)
        ending.start()
        yield with_engines(config, ("http://n1:20001",), resume=False)

    monkeypatch.setattr(slurm_step, "engines_for", engines_for)
    write_json(tmp_path / "launch.json", to_dict(load(["experiment=quickstart", f"run.dir={tmp_path}"])))
    try:
        with pytest.raises(lease.Superseded) if overtaken else contextlib.nullcontext():
            slurm_step.engine(str(tmp_path / "launch.json"), "0", "0", "127.0.0.1")
    finally:
        ending.join()  # the signal would end the tests without the handler
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (tmp_path / "engine-0.url").exists() != overtaken


def test_a_port_for_rank_0_that_is_taken_is_left_out():
    port, free = choose_port(None), choose_port(None)  # where the kernel gives no other test one
    with socket.create_server(("127.0.0.1", port)):
        assert choose_port(None, ports=[port, free]) == free


@pytest.mark.parametrize("port", [None, 20500])
def test_a_host_that_is_another_machine_is_not_said_to_lack_ports(port):
    with pytest.raises(ValueError, match="192.0.2.1 leads to no address of this machine, and rollout.engine.port is"):
        choose_port(port, host="192.0.2.1")
