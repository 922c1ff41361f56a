"""What `megatron-rl torchrun` refuses before anything starts, and what it hands to the machines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from megatron_rl.compat.own_name import check_own_name
from megatron_rl.config.load import load
from megatron_rl.config.orchestrator import RUN_KEY
from megatron_rl.launch.by_hand import SCRIPT, Machines, check, run, write_script
from megatron_rl.launch.local import RunFailed, rank_environment
from megatron_rl.launch.programs import OrchestratorFailed, OrchestratorKeeper
from megatron_rl.observe import lease

GOOD = ["experiment=quickstart", "parallel.world_size=4", "rollout.publish=broadcast",
        "rollout.engine.urls=[http://n3:20500]", "orchestrator.host=n1"]


@pytest.mark.parametrize(("nodes", "overrides", "told"), [
    (3, [], "--nodes 3 does not divide parallel.world_size=4"),
    (2, ["rollout.engine.urls=[]"], "rollout.engine.urls is empty: start the engines first, with `megatron-rl engine`"),
    (2, ["rollout.engine.urls=[http://127.0.0.1:1]"], "leads every machine to itself"),
    (2, ["rollout.publish=tensor"], "choose broadcast or disk"),
    (2, ["run.steps=2", "stages=[{name: a, steps: 1}, {name: b, steps: 1}]"], "run each stage by itself"),
])
def test_what_cannot_run_by_hand_is_refused(nodes, overrides, told):
    check(load(GOOD), Machines(2))
    with pytest.raises(ValueError, match=told):
        check(load([*GOOD, *overrides]), Machines(nodes))


def test_a_name_that_leads_home_is_refused(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: {"n1": "127.0.1.1", "n2": "10.0.0.2"}[name])
    check_own_name("n2")
    with pytest.raises(ValueError, match="n1 is 127.0.1.1 on itself.*Debian"):
        check_own_name("n1")


def test_the_script_is_for_the_user_alone_and_asks_for_its_number(tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_KEY, "secret of the run")
    config = load([*GOOD, f"run.dir={tmp_path}"])
    script = write_script(config, 2, "n1", 29500)
    assert script.stat().st_mode & 0o777 == 0o600
    text = script.read_text()
    assert "--nnodes=2" in text and "--nproc-per-node=2" in text and "--master-addr=n1 --master-port=29500" in text
    assert "export MEGATRON_RL_RUN_KEY='secret of the run'" in text
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode and "the number of this machine" in done.stderr


@pytest.mark.parametrize("overtaken", [False, True])
def test_a_start_that_fails_ends_its_own_ranks_and_no_newer_starts(overtaken, tmp_path, monkeypatch):
    """An orchestrator that a newer start has overtaken ends with an error, too."""
    monkeypatch.setenv(RUN_KEY, "k")
    monkeypatch.setenv(lease.START_NUMBER, "")  # so that it is undone

    def fails(_) -> None:
        if overtaken:
            ours = os.environ[lease.START_NUMBER]
            lease.take(tmp_path)
            os.environ[lease.START_NUMBER] = ours
        raise OrchestratorFailed("the orchestrator ended")

    monkeypatch.setattr(OrchestratorKeeper, "start", fails)
    with pytest.raises(RunFailed, match="the orchestrator ended"):
        run(load([*GOOD, f"run.dir={tmp_path}", "rollout.engine.urls=[http://127.0.0.1:1]",
                  "orchestrator.host=127.0.0.1"]), Machines(2, "n1:29500"), lambda _: None)
    held = json.loads((tmp_path / lease.LEASE).read_text())
    assert (held["number"], held["over"]) == (2, not overtaken)
    assert (tmp_path / SCRIPT).exists() == overtaken, "the keys of a failed start, or a newer start's script"


@pytest.mark.skipif(os.getuid() != 0, reason="namespaces need root")
@pytest.mark.parametrize(("first", "gone"), [("torchrun", False), ("init", True)])
def test_a_launcher_may_be_process_1_of_a_container(first, gone, tmp_path):
    """Process 1 runs a rank's test of its parent; its name decides whether that is a launcher or an orphan's parent."""
    (tmp_path / first).write_text(
        "import subprocess, sys\n"
        "sys.exit(subprocess.run([sys.executable, '-c', 'import sys; from megatron_rl.rollout.die_with_parent import "
        "launcher_is_gone; sys.exit(launcher_is_gone())']).returncode)\n")
    folder = tmp_path / first  # python TMP/torchrun, as the installed command runs
    done = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", sys.executable, str(folder)],
                          env=rank_environment(), capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    assert done.returncode == gone, done.stderr
