"""The processes behind test_share.py: `python -m tests.distributed.share_worker FOLDER WORLD_SIZE LAYOUT...`.

Rank 0 writes LAYOUT.json there: what every rank trains on, and how often each data-parallel rank was pulled for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from megatron_rl.config.orchestrator import OrchestratorConfig
from megatron_rl.handoff import UpdateShard, write_shard
from megatron_rl.topology import Topology
from megatron_rl.trainer.client import Link
from megatron_rl.types import TrainSample
from tests.distributed.worker import main


class Orchestrator:
    """Answers pulls as the real one does; `pulled` lists them."""

    def __init__(self):
        self.pulled: list[str] = []

    def request(self, method: str, path: str) -> bytes:
        self.pulled.append(path)
        return write_shard([UpdateShard(samples(int(path.rpartition("/")[2])), (1, 2), (0, 0), 8, 8, 3)])


def samples(dp_rank: int) -> tuple[TrainSample, ...]:
    rng = np.random.default_rng(dp_rank)
    return tuple(TrainSample(index, rng.integers(0, 99, length).astype(np.int32), np.arange(length) > 1,
                             rng.normal(size=length).astype(np.float32), 0.5, length - 2,
                             rng.integers(0, 256, (length - 1, 3, 2), dtype=np.uint8))
                 for index, length in enumerate((5, 3, 9)))


def run_layout(folder: Path, layout: str, here: Topology) -> None:
    link = Link(OrchestratorConfig(port=1), here)
    link._client = Orchestrator()
    [update] = link.shard(7)
    own = all(np.array_equal(getattr(found, name), getattr(sent, name))
              for found, sent in zip(update.samples, samples(here.dp_rank), strict=True)
              for name in ("token_ids", "loss_mask", "rollout_logprobs", "routed_experts"))
    found = here.gather_objects((own, link._client.pulled))
    if here.is_main:
        (folder / f"{layout}.json").write_text(json.dumps(
            {"own": all(each for each, _ in found), "pulled": sorted(path for _, pulled in found for path in pulled)}))


if __name__ == "__main__":
    main(run_layout, *sys.argv[1:])
