"""What the ranks of a Slurm job are told of its engines."""

import os
import shlex
from dataclasses import replace

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.rollout import ENGINE_KEY
from megatron_rl.config.schema import Config
from megatron_rl.launch.slurm import job_script
from megatron_rl.launch.slurm_job import master_port, with_engines
from megatron_rl.rollout.engine_command import draw_key
from megatron_rl.rollout.ports import PORTS


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
    ports = [master_port(str(job)) for job in range(4_000_000, 4_002_000)]
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
