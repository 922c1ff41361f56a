"""One polling thread of gloo in a process, however many groups it is in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

GROUPS = """
import os, time
from pathlib import Path
import torch
import torch.distributed as dist
from megatron_rl.compat.gloo_device import share_gloo_device

def names():
    return {task.name: (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}

def in_five_groups():
    earlier = names()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for group in [dist.new_group(backend="gloo") for _ in range(5)]:
        dist.all_reduce(torch.ones(1), group=group)
    while any(name == earlier[str(os.getpid())] for task, name in names().items() if task not in earlier):
        time.sleep(0.01)  # a thread has its maker's name until it first runs and names itself
    found = list(names().values())
    dist.destroy_process_group()
    return found.count("gloo_tcp_loop")

share_gloo_device()
print(in_five_groups(), flush=True)
child = os.fork()
if child == 0:
    print(in_five_groups(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize("interface", [{}, {"GLOO_SOCKET_IFNAME": "lo"}])
def test_groups_share_a_thread_and_a_forked_process_has_its_own(interface):
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"} | interface
    done = subprocess.run([sys.executable, "-c", GROUPS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1"]
