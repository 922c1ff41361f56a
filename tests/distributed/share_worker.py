"""The processes behind test_share.py: `python -m tests.distributed.share_worker FOLDER WORLD_SIZE LAYOUT...`.

Rank 0 writes LAYOUT.json there: for each way of dealing the samples, whether every rank got what it should.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_rl.recipes.routing import share_routed_experts
from megatron_rl.topology import Topology
from megatron_rl.types import TrainSample
from tests.distributed.worker import main

SHAPE = (3, 2)
LENGTHS = (5, 1, 7, 2, 4)


def samples(*, with_experts: bool) -> list[TrainSample]:
    rng = np.random.default_rng(0)
    experts = [rng.integers(0, 256, (length, *SHAPE), dtype=np.uint8) for length in LENGTHS]
    return [TrainSample(index, np.arange(length + 1), np.ones(length, dtype=bool), np.zeros(length, dtype=np.float32),
                        0.0, length, experts[index] if with_experts else None) for index, length in enumerate(LENGTHS)]


def own_and_no_others(places: Sequence[Sequence[int]], here: Topology) -> bool:
    """Every rank has the experts that only rank 0 had, of its own sequences; all others have those only there."""
    found = share_routed_experts(samples(with_experts=here.is_main), places, here, SHAPE)
    expected, mine = samples(with_experts=True), places[here.dp_rank]
    equal = all(np.array_equal(found[i].routed_experts, expected[i].routed_experts) for i in mine)
    alone = here.is_main or all(found[i].routed_experts is None for i in range(len(found)) if i not in mine)
    return all(here.gather_objects(equal and alone))


def run_layout(folder: Path, layout: str, here: Topology) -> None:
    everything, nothing = list(range(len(LENGTHS))), [[]] * (here.dp_size - 1)
    dealt = {"in turn": [everything[rank::here.dp_size][::-1] for rank in range(here.dp_size)],
             "all to the first": [everything, *nothing], "all to the last": [*nothing, everything]}
    result = {name: own_and_no_others(places, here) for name, places in dealt.items()}
    if here.is_main:
        (folder / f"{layout}.json").write_text(json.dumps({"dp": here.dp_size, **result}))


if __name__ == "__main__":
    main(run_layout, *sys.argv[1:])
