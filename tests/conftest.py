"""Environment of every test process and of the processes it starts; set before torch is imported.

GPUs are hidden: the tests' models are float32, which engines on CUDA do not take, and their heads are small. `make
test-gpu` (MEGATRON_RL_TEST_GPU=1) shows them to tests/card, and leaves torch.compile (Megatron's jit_fuser) as it is.
One thread per process (several ranks share few cores), no torch.compile elsewhere, and no
network: wandb writes files, Hugging Face reads local folders.
"""

import os
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1",
    WANDB_MODE="offline",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MEGATRON_RL_ENGINE_KEY="the key of every engine of the tests",
)

if os.environ.get("MEGATRON_RL_TEST_GPU") != "1":
    os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1")

import pytest
import torch

if not torch.cuda.is_available():
    # triton.language decides at its import whether to interpret kernels; processes started by tests do not inherit it
    os.environ["TRITON_INTERPRET"] = "1"
    import rl_kernels.triton_impl  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

HERE = Path(__file__).resolve().parent
LONGEST_FIRST = ("engine/test_runs.py", "slurm", "engine/test_ablations.py", "engine", "distributed", "card",
                 "test_benchmarks.py")
"""Files, and folders of files, that start real processes."""


def pytest_collection_modifyitems(items):
    """Long files first: no test process is left alone with one at the end."""
    def rank(item):
        path = item.path.relative_to(HERE)
        return next((place for place, start in enumerate(LONGEST_FIRST) if path.is_relative_to(start)),
                    len(LONGEST_FIRST))

    items.sort(key=rank)


@pytest.fixture
def messages(caplog):
    """messages() -> what megatron_rl has logged in this test. Python's own complaints about earlier tests stay out."""
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("megatron_rl")]
