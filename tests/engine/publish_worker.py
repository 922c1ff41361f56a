"""One rank that publishes a checkpoint through every transport: `python -m tests.engine.publish_worker CONFIG.json`.

Before each, other weights are published, so that what the engines hold afterwards came through that transport. Rank 0
writes each engine's log-probabilities of PROBE to <run.dir>/<transport>.json.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from megatron_rl import topology
from megatron_rl.config.load import from_json
from megatron_rl.model.architectures import read_config
from megatron_rl.model.build import build_policy
from megatron_rl.model.convert import Exporter, load_hf
from megatron_rl.rollout.client import engine_clients
from megatron_rl.sync.broadcast import BroadcastPublisher
from megatron_rl.sync.disk import DiskPublisher
from megatron_rl.sync.tensor import TensorPublisher
from megatron_rl.sync.verify import ExpectedChecksums, verify_engines
from megatron_rl.trainer.export import export
from tests.tiny_models import tiny_bailing_weights

PROBE = tuple(range(10, 58))
BUCKET_BYTES = 50_000


def main(path: str) -> None:
    config = from_json(path)
    run_dir, version = Path(config.run.dir), int(sys.argv[2])
    here = topology.start(config.parallel, seed=0)
    policy = build_policy(read_config(config.model.path), config.model, config.parallel, with_gradients=False)
    load_hf(policy, here, config.model.path)
    exporter = Exporter(policy, here)
    export(config, exporter, here, run_dir / "hf")
    clients = engine_clients(config)
    raw = json.loads((Path(config.model.path) / "config.json").read_text())
    shared = {"bucket_bytes": BUCKET_BYTES}
    transports = {
        "tensor": lambda: TensorPublisher(clients, **shared),
        "broadcast": lambda: BroadcastPublisher(clients, **shared, backend="gloo", device="cpu"),
        "disk": lambda: DiskPublisher(clients, **shared, folder=run_dir / "published", config_folder=config.model.path),
    }
    for transport, build in transports.items():
        tensors = exporter()
        if here.is_main:
            others = tiny_bailing_weights(raw, seed=version)
            TensorPublisher(clients, **shared).publish(others.items(), version)
            expected = ExpectedChecksums(raw, engine_dtype=next(iter(others.values())).dtype)
            publisher = build()
            report = publisher.publish(expected.watch(tensors), version + 1)
            assert not report.failures, report.failures
            verify_engines(clients, expected)
            publisher.close()
            found = [asyncio.run(probe(client)) for client in clients]
            (run_dir / f"{transport}.json").write_text(json.dumps(found))
        else:
            for _ in tensors:
                pass
        version += 2
        here.barrier()
    topology.stop()


async def probe(client) -> list[float]:
    async with client:
        return (await client.input_logprobs(PROBE, rid="probe.")).tolist()


if __name__ == "__main__":
    main(sys.argv[1])
