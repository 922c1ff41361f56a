"""The JobSet of examples/kubernetes: its commands are taken, and its numbers, names and ports agree with each other."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from megatron_rl.cli import parse
from megatron_rl.config.load import load
from megatron_rl.launch.by_hand import SCRIPT, Machines, check
from megatron_rl.launch.programs import EXIT_CODES
from megatron_rl.loop import End

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load((ROOT / "examples" / "kubernetes" / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def jobs(jobset) -> dict[str, dict]:
    return {job["name"]: job for job in jobset["spec"]["replicatedJobs"]}


def pod(jobs: dict[str, dict], role: str) -> dict:
    (container,) = jobs[role]["template"]["spec"]["template"]["spec"]["containers"]
    return container


def words(jobs: dict[str, dict], role: str, host: str) -> list[str]:
    text = pod(jobs, role)["args"][0].replace("$(hostname)", host)
    return shlex.split(text.removeprefix("exec megatron-rl "))


def names(jobset: dict, job: dict) -> list[str]:
    """Under which its pods are reached."""
    spec, network = job["template"]["spec"], jobset["spec"]["network"]
    return [f"{jobset['metadata']['name']}-{job['name']}-{replica}-{index}.{network['subdomain']}"
            for replica in range(job["replicas"]) for index in range(spec["completions"])]


def test_the_orchestrator_engines_and_ranks_agree(jobset, jobs):
    options = parse(words(jobs, "orchestrator", "rl-orchestrator-0-0"))
    assert options.command == "torchrun"
    config = check(load(options.overrides), Machines(options.nodes, options.master))
    ranks, gpus = jobs["ranks"]["template"]["spec"], pod(jobs, "ranks")["resources"]["limits"]["nvidia.com/gpu"]
    assert ranks["completionMode"] == "Indexed" and ranks["completions"] == ranks["parallelism"] == options.nodes
    assert config.parallel.world_size == options.nodes * gpus
    assert options.master.split(":")[0] == names(jobset, jobs["ranks"])[0]
    assert names(jobset, jobs["orchestrator"]) == [config.orchestrator.host] and config.orchestrator.port
    hosts = names(jobset, jobs["engine"])
    served = []
    for host in hosts:
        engine_options = parse(words(jobs, "engine", host.split(".")[0]))
        engine = load(engine_options.overrides).rollout.engine
        assert engine_options.command == "engine" and engine.host == host and engine.count == 1
        assert engine.tp == pod(jobs, "engine")["resources"]["limits"]["nvidia.com/gpu"]
        served.append(f"http://{engine.host}:{engine.port}")
    assert list(config.rollout.engine.urls) == served
    script = f"{config.run.dir}/{SCRIPT}".removeprefix(pod(jobs, "ranks")["workingDir"] + "/")
    assert pod(jobs, "ranks")["args"][0].count(script) == 2


def test_every_role_has_the_engines_key_and_the_shared_folder(jobset, jobs):
    assert jobset["spec"]["successPolicy"]["targetReplicatedJobs"] == ["orchestrator"]
    for role in ("engine", "orchestrator", "ranks"):
        container = pod(jobs, role)
        assert [variable["name"] for variable in container["env"]] == ["MEGATRON_RL_ENGINE_KEY"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"] for volume in jobs[role]["template"]["spec"]["template"]["spec"]["volumes"]}
        assert mounted["shared"] == container["workingDir"] and set(mounted) == volumes


def test_a_run_that_is_over_early_is_not_started_again(jobset, jobs):
    (rule,) = jobs["orchestrator"]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [EXIT_CODES[End.UNFILLABLE]] and rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == pod(jobs, "orchestrator")["name"]
    assert jobs["orchestrator"]["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # asked for by it
    (of_all,) = jobset["spec"]["failurePolicy"]["rules"]
    assert of_all["action"] == "FailJobSet" and of_all["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert of_all["targetReplicatedJobs"] == ["orchestrator"]
