"""Claims: publishing weights costs little more than moving their bytes, and little memory.

Each transport against raw movement of as many bytes in the same run: a gloo broadcast to one other process
(broadcast), a copy into shared memory and out of it (tensor), a new file written, renamed and read (disk). Publishing
includes pausing the engine, loading into its parameters and resuming; over gloo both are the CPU's work, one after the
other, so the engine's loading (as in the tensor transport) is added to the raw broadcast in a second row. An expert's
matrices have 2.9 MB (Ling-lite's 5.8). The memory is the largest extra of the sender, in buckets. The seconds for
Ling-lite's 33.6 GB in the details are a projection and no measurement.
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from benchmarks import workload
from benchmarks.common import Row, main, median, peak_growth_bytes
from megatron_rl.config.rollout import EngineConfig, RolloutConfig
from megatron_rl.data.chains import chains_tokenizer
from megatron_rl.model.fresh import bailing_config, random_weights
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.engine_command import draw_key, engine_key
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.ports import choose_port
from megatron_rl.sync.broadcast import BroadcastPublisher
from megatron_rl.sync.disk import DiskPublisher
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.tensor import TensorPublisher

BUCKET_BYTES = 32 << 20
LING_LITE_BYTES = 33.6e9
BYTES_PER_LAYER = 75 << 20


class TimedClient(EngineClient):
    """Notes the seconds that the engine takes to load what it already sees in shared memory."""

    loading_s = 0.0

    async def update_weights_from_tensor(self, *args: Any, **options: Any) -> None:
        began = time.perf_counter()
        await super().update_weights_from_tensor(*args, **options)
        self.loading_s += time.perf_counter() - began


def write_model(folder: Path, megabytes: int) -> Path:
    tokenizer = folder / "tokenizer"
    chains_tokenizer(tokenizer)
    config = bailing_config(hidden_size=1024, num_attention_heads=8, num_key_value_heads=4, num_experts=8,
                            moe_intermediate_size=704, num_hidden_layers=max(1, (megabytes << 20) // BYTES_PER_LAYER))
    write_hf_folder(folder / "model", config, random_weights(config, 0, scheme="scaled"), tokenizer_from=tokenizer)
    return folder / "model"


def receive(port: int, num_bytes: int, rounds: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=1, world_size=2)
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    for _ in range(rounds):
        dist.broadcast(buffer, src=0)
        dist.barrier()
    dist.destroy_process_group()


def raw_broadcast(num_bytes: int, rounds: int) -> list[float]:
    port = choose_port(None)
    other = multiprocessing.get_context("spawn").Process(target=receive, args=(port, num_bytes, rounds))
    other.start()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
    buffer = torch.ones(num_bytes, dtype=torch.uint8)

    def once() -> None:
        dist.broadcast(buffer, src=0)
        dist.barrier()

    seconds = timed(once, rounds)
    dist.destroy_process_group()
    other.join()
    return seconds


def raw_copy(num_bytes: int, rounds: int) -> list[float]:
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)

    def once() -> None:
        shared = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()
        shared.copy_(source)
        target.copy_(shared)

    return timed(once, rounds)


def raw_disk(folder: Path, num_bytes: int, rounds: int) -> list[float]:
    content = np.ones(num_bytes, dtype=np.uint8)

    def once() -> None:
        content.tofile(folder / "unfinished.bin")
        (folder / "unfinished.bin").replace(folder / "raw.bin")
        np.fromfile(folder / "raw.bin", dtype=np.uint8)

    return timed(once, rounds)


def timed(once: Callable[[], None], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(*, quick: bool, megabytes: int, rounds: int) -> tuple[list[Row], dict]:
    workload.set_environment()  # threads of ours that spin would take the core from an engine's
    megabytes, rounds = (12, 1) if quick else (megabytes, rounds)
    rollout = RolloutConfig(max_context_tokens=128, engine=EngineConfig(
        max_running_requests=4, max_total_tokens=1024, start_timeout_s=900.0))
    rows: list[Row] = []
    details: dict = {}
    loading_s = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder, megabytes)
        weights = load_file(model / "model.safetensors")
        total = sum(tensor.nbytes for tensor in weights.values())
        raw = {"tensor": raw_copy(total, rounds), "broadcast": raw_broadcast(total, rounds),
               "disk": raw_disk(folder, total, rounds)}
        draw_key(rollout.engine)
        with EngineProcess.from_config(rollout, model, log_path=folder / "engine.log") as engine:
            clients = [TimedClient(engine.base_url, api_key=engine_key(rollout.engine))]
            publishers: dict[str, Publisher] = {
                "tensor": TensorPublisher(clients, bucket_bytes=BUCKET_BYTES),
                "broadcast": BroadcastPublisher(clients, bucket_bytes=BUCKET_BYTES, backend="gloo", device="cpu"),
                "disk": DiskPublisher(clients, bucket_bytes=BUCKET_BYTES, folder=folder / "published",
                                      config_folder=model)}
            versions = itertools.count(1)
            for transport, publisher in publishers.items():
                publisher.publish(weights.items(), next(versions))  # makes the group, warms the engine
                clients[0].loading_s = 0.0
                seconds = [publisher.publish(weights.items(), next(versions)).seconds for _ in range(rounds)]
                loading_s = clients[0].loading_s / rounds if transport == "tensor" else loading_s
                grown = peak_growth_bytes(lambda of=publisher: of.publish(weights.items(), next(versions)))
                publisher.close()
                rows += [Row(f"weight sync: {transport} against raw movement", total / median(seconds) / 1e6,
                             total / median(raw[transport]) / 1e6, "MB/s", None if quick else 0.6, "at least"),
                         Row(f"weight sync: extra memory of {transport}", grown / BUCKET_BYTES, None, "buckets",
                             None if quick else 2.0)]
                details[transport] = {"seconds": seconds, "raw_seconds": raw[transport],
                                      "projected_ling_lite_seconds": LING_LITE_BYTES / (total / median(seconds))}
                if transport == "broadcast":
                    rows.append(Row("weight sync: broadcast against raw movement and the engine's loading",
                                    total / median(seconds) / 1e6, total / (median(raw[transport]) + loading_s) / 1e6,
                                    "MB/s"))
    return rows, {"bytes": total, "bucket_bytes": BUCKET_BYTES, "engine_loading_seconds": loading_s, **details}


if __name__ == "__main__":
    main("weight_sync", measure, megabytes=128, rounds=5)
