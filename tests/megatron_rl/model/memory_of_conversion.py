"""Loads a checkpoint of about 200 MB and writes it back, and prints what memory that took beyond the model itself.

`python -m tests.megatron_rl.model.memory_of_conversion FOLDER` prints one JSON object, all in bytes. Memory is RssAnon,
sampled while the work runs: pages of the checkpoint's files that the kernel may drop at any time are not in it.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch

from megatron_rl import topology
from megatron_rl.config.schema import ModelConfig, ParallelConfig
from megatron_rl.model.architectures import parse_config
from megatron_rl.model.build import build_policy
from megatron_rl.model.convert import Exporter, load_hf
from megatron_rl.model.fresh import bailing_config, random_weights
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.model.slots import expected_shapes

SHARD_BYTES = 16 * 2**20


def anonymous_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@contextmanager
def peak_of(found: dict[str, int], name: str):
    """found[name]: the most anonymous memory during the block, less what there was before it."""
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.0005)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    found[name] = peak[0] - before


def main(folder: Path) -> None:
    config = bailing_config(vocab_size=8192, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
                            num_experts=16, moe_intermediate_size=256, norm_head=True)
    network = parse_config(config, "config.json")
    sizes = [prod(shape) * 4 for shape in expected_shapes(network).values()]
    found = {"model": sum(sizes), "largest_tensor": max(sizes), "shard": SHARD_BYTES}
    with peak_of(found, "write_random"):
        write_hf_folder(folder / "source", config, random_weights(config, 0), max_shard_bytes=SHARD_BYTES)
    here = topology.start(ParallelConfig(), seed=0)
    policy = build_policy(network, ModelConfig(path="source"), ParallelConfig(), with_gradients=False)
    for parameter in policy.gpt_models[0].parameters():
        torch.nn.init.zeros_(parameter)  # its pages are the model's, not the loader's
    with peak_of(found, "load"):
        load_hf(policy, here, folder / "source")
    exporter = Exporter(policy, here)
    for name, shard_bytes in (("export", SHARD_BYTES), ("export_in_one_shard", sum(sizes))):
        with peak_of(found, name):
            write_hf_folder(folder / name, config, exporter(), max_shard_bytes=shard_bytes)
    topology.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
