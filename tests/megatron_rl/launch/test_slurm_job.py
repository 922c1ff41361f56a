"""What the ranks of a Slurm job are told of its engines."""

import os
import shlex
import socket
from dataclasses import replace

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.rollout import ENGINE_KEY
from megatron_rl.config.schema import Config
from megatron_rl.launch.slurm import job_script
from megatron_rl.launch.slurm_job import master_ports, with_engines
from megatron_rl.launch.slurm_step import check_place
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


def test_a_port_for_rank_0_that_is_taken_is_left_out():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert choose_port(None, ports=[port, port + 1]) == port + 1
