"""Ranks that are forked see what torchrun's see, and end as torchrun's do."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from megatron_rl import forked_ranks
from megatron_rl.config.load import load
from megatron_rl.launch.local import last_words, rank_environment, ranks_command
from megatron_rl.rollout.ports import choose_port


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_and_its_traceback_is_what_a_user_sees(tmp_path):
    log, spoken = tmp_path / "trainer.log", str(tmp_path / "rank_0_has_spoken")
    with log.open("wb") as file:
        code = subprocess.run(
            [sys.executable, "-m", "megatron_rl.forked_ranks", "2", str(choose_port(None)),
             "tests.megatron_rl.rank_of_tests", spoken],
            env=rank_environment(), stdout=file, stderr=file, timeout=300).returncode
    text = log.read_text()
    assert code == 1 and {f"{spoken} 0 0 2 127.0.0.1", f"{spoken} 1 1 2 127.0.0.1"} <= set(text.splitlines())
    assert "ValueError: made up" in last_words(log, 0)
    assert re.search(r"rank 1 \(pid \d+\) failed; the other ranks were ended with it", text)
    assert not [one for one in psutil.process_iter(["cmdline"]) if spoken in (one.info["cmdline"] or ())]


def test_a_killed_rank_is_named_though_another_one_that_lost_it_has_ended_too(monkeypatch):
    """torch names the first in its list of those that have ended when it looks."""
    def join():
        raise ProcessRaisedException("", 0, 10)

    started = SimpleNamespace(sentinels=[1, 2], join=join, processes=[
        SimpleNamespace(exitcode=1, pid=10), SimpleNamespace(exitcode=-9, pid=11)])
    monkeypatch.setattr(torch.multiprocessing, "start_processes", lambda *_, **__: started)
    monkeypatch.setattr(forked_ranks, "connection", SimpleNamespace(wait=lambda sentinels: sentinels))
    monkeypatch.setattr(forked_ranks, "import_recipes", lambda: None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is undone
    with pytest.raises(SystemExit, match=r"rank 1 \(pid 11\) ended with exitcode: -9 ;"):
        forked_ranks.main(["2", "1", "module"])


@pytest.mark.parametrize(("gpus", "module"), [(True, "megatron_rl.compat.loopback_store"),
                                              (False, "megatron_rl.forked_ranks")])
def test_torchrun_starts_the_ranks_of_a_machine_with_gpus(gpus, module, monkeypatch):
    """A process that has looked for a GPU cannot fork processes that use one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    command = ranks_command(load(["parallel=ep2", "model.path=here"]))
    assert command[1:3] == ["-m", module]
    assert ("--nproc-per-node=2" in command) == gpus and (command[3] == "2") != gpus
