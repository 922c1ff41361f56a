"""What asks a run to stop reaches all of its processes; the one that keeps shared memory must outlive it."""

import subprocess
import sys

import pytest

SHARES = """
import signal
import psutil
from megatron_rl.rollout.client import EngineClient
from megatron_rl.sync.tensor import TensorPublisher
publisher = TensorPublisher([EngineClient("http://127.0.0.1:9")], bucket_bytes=1000)
for number in (signal.SIGUSR1, signal.SIGTERM):
    publisher._new_buffer(1000)
    (keeper,) = psutil.Process().children()
    assert keeper.name() == "torch_shm_manager"
    keeper.send_signal(number)
    psutil.wait_procs([keeper], timeout=0.5)
publisher._new_buffer(1000)
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""


@pytest.mark.slow
def test_a_publish_goes_on_after_the_signals_that_ask_a_run_to_stop():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SHARES], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
