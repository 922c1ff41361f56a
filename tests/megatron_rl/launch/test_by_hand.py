"""What `megatron-rl torchrun` refuses before anything starts, and what it hands to the machines."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from megatron_rl import cli
from megatron_rl.compat.own_name import check_own_name
from megatron_rl.config.load import load
from megatron_rl.config.orchestrator import RUN_KEY
from megatron_rl.launch import by_hand
from megatron_rl.launch.by_hand import SCRIPT, Machines, _master, check, run, write_script
from megatron_rl.launch.hosts import check_tensor
from megatron_rl.launch.local import RunFailed, rank_environment
from megatron_rl.launch.programs import OrchestratorFailed, OrchestratorKeeper
from megatron_rl.observe import lease
from megatron_rl.rollout.ports import choose_port
from tests.tiny_models import write_tiny_bailing

GOOD = ["experiment=quickstart", "parallel.world_size=4", "rollout.publish=broadcast",
        "rollout.engine.urls=[http://n3:20500]", "orchestrator.host=n1"]


@pytest.mark.parametrize(("nodes", "overrides", "told"), [
    (3, [], "--nodes 3 does not divide parallel.world_size=4"),
    (2, ["rollout.engine.urls=[]"], "rollout.engine.urls is empty: start the engines first, with `megatron-rl engine`"),
    (2, ["rollout.engine.urls=[http://127.0.0.1:1]"], "leads every machine to itself"),
    (2, ["rollout.publish=tensor"], "choose broadcast or disk"),
    (1, ["rollout.publish=tensor"], "http://n3:20500 of rollout.engine.urls leads to another: choose broadcast"),
    (2, ["run.steps=2", "stages=[{name: a, steps: 1}, {name: b, steps: 1}]"], "run each stage by itself"),
])
def test_what_cannot_run_by_hand_is_refused(nodes, overrides, told):
    check(load(GOOD), Machines(2))
    with pytest.raises(ValueError, match=told):
        check(load([*GOOD, *overrides]), Machines(nodes))


@pytest.mark.parametrize("master", ["", ":29500", "n1:", "n1:0", "n1:65536", "n1:x", "fe80::1"])
def test_a_master_that_is_no_host_and_port_is_refused(master):
    with pytest.raises(ValueError, match=f"--master {master}: give HOST or HOST:PORT"):
        check(load(GOOD), Machines(2, master))


def test_engines_on_this_machine_may_share_its_memory_and_others_may_not(tmp_path, capsys):
    """Its own name is no other machine."""
    words = [*GOOD, "rollout.publish=tensor", "rollout.engine.urls=[http://127.0.0.1:1,http://HOST:2]"]
    here = load([word.replace("HOST", socket.gethostname()) for word in words])
    check(here, Machines(1))
    check_tensor(here)
    model = write_tiny_bailing(tmp_path / "model")
    assert cli.main(["rl", f"model.path={model}", f"run.dir={tmp_path / 'run'}", "data.source=chains",
                     "rollout.max_context_tokens=128", "rollout.engine.urls=[http://192.0.2.1:1]"]) == 2
    assert "http://192.0.2.1:1 of rollout.engine.urls leads to another" in " ".join(capsys.readouterr().err.split())


def test_ranks_on_one_other_machine_are_told_of_this_one_by_its_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.2")
    elsewhere = Machines(1, "192.0.2.1")
    assert check(load([*GOOD, "orchestrator.host=127.0.0.1"]), elsewhere).orchestrator.host == socket.gethostname()
    assert check(load([*GOOD, "orchestrator.host=127.0.0.1"]), Machines(1)).orchestrator.host == "127.0.0.1"
    for override, told in (("rollout.publish=tensor", "of one machine: choose broadcast or disk"),
                           ("rollout.engine.urls=[http://127.0.0.1:1]", "leads every machine to itself")):
        with pytest.raises(ValueError, match=told):
            check(load([*GOOD, override]), elsewhere)


def test_runs_on_one_machine_find_each_a_port(monkeypatch):
    first = choose_port(None)  # others on this machine may use the real ones
    monkeypatch.setattr(by_hand, "MASTER_PORTS", range(first, first + 100))
    with socket.create_server(("127.0.0.1", first)):
        host, port = _master(Machines(1))
        assert host == "127.0.0.1" and first < port < first + 100
        with pytest.raises(ValueError, match=f"the port of --master={first} is taken on 127.0.0.1"):
            _master(Machines(1, f"127.0.0.1:{first}"))
    assert _master(Machines(2, "192.0.2.1")) == ("192.0.2.1", first)


def test_a_name_that_leads_home_is_refused(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: {"n1": "127.0.1.1", "n2": "10.0.0.2"}[name])
    check_own_name("n2")
    with pytest.raises(ValueError, match="n1 is 127.0.1.1 on itself.*Debian"):
        check_own_name("n1")


def test_the_script_is_for_the_user_alone_and_asks_for_its_number(tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_KEY, "secret of the run")
    (tmp_path / "gr\u00f6\u00dfer").mkdir()
    config = load([*GOOD, f"run.dir={tmp_path}/gr\u00f6\u00dfer"])
    script = write_script(config, 2, "n1", 29500)
    assert script.stat().st_mode & 0o777 == 0o600
    text = script.read_text(encoding="utf-8")
    assert f"{tmp_path}/gr\u00f6\u00dfer/launch.json" in text
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


def test_a_folder_that_is_removed_meanwhile_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_KEY, "k")
    monkeypatch.setenv(lease.START_NUMBER, "")
    monkeypatch.setattr(OrchestratorKeeper, "start", lambda _: shutil.rmtree(tmp_path / "run"))
    monkeypatch.setattr(OrchestratorKeeper, "poll", lambda _: None)
    with pytest.raises(RunFailed, match=f"run.dir={tmp_path}/run was removed while the run went on"):
        run(load([*GOOD, f"run.dir={tmp_path}/run", "rollout.engine.urls=[http://127.0.0.1:1]",
                  "orchestrator.host=127.0.0.1"]), Machines(2, "n1:29500"), lambda _: None)


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
