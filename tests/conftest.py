"""Environment of every test process and of the processes it starts; set before torch is imported.

One thread per process (several ranks share few cores), no torch.compile (Megatron's jit_fuser), and no
network: wandb writes files, Hugging Face reads local folders.
"""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    TORCHDYNAMO_DISABLE="1",
    WANDB_MODE="offline",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import torch

if not torch.cuda.is_available():
    # triton.language decides at its import whether to interpret kernels; processes started by tests do not inherit it
    os.environ["TRITON_INTERPRET"] = "1"
    import rl_kernels.triton_impl  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
