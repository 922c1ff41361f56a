"""Memory that one thread frees is used again by another, without the kernel in between."""

from __future__ import annotations

import subprocess
import sys

import pytest

PAGES_OF_A_ROUND = 20 * 600_000 * 2 // 4096
ROUNDS = 30
PROGRAM = f"""
import resource, sys, threading
from megatron_rl.orchestrator.allocator import keep_freed_memory

def answers():
    for _ in range({ROUNDS}):
        pieces = [b"x" * 600_000 for _ in range(20)]
        whole = b"".join(pieces)
        del pieces, whole

if sys.argv[1] == "kept":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(2):
    thread = threading.Thread(target=answers)
    thread.start()
    thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("how", "rounds"), [("kept", (0, 2)), ("as it comes", (ROUNDS, 3 * ROUNDS))])
def test_freed_memory_is_used_again(how, rounds):
    """Counts page faults in units of one round. Without the call every round faults, or the test shows nothing."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    least, most = rounds
    assert least * PAGES_OF_A_ROUND <= int(done.stdout) <= most * PAGES_OF_A_ROUND
