"""`megatron-rl rehearse`: which ranks, which micro-batch; text to the screen, JSON to a file."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import Config
from megatron_rl.model.network import Network, check_layout
from megatron_rl.plan.activations import chunks_in_flight
from megatron_rl.plan.memory import expected_microbatches
from megatron_rl.rehearsal.ranks import check_rank, distinct_ranks
from megatron_rl.rehearsal.report import rank_text, stages_text
from megatron_rl.rehearsal.roofline import Rates
from megatron_rl.rehearsal.standins import shares
from megatron_rl.rehearsal.step import Workload, check_rehearsable, rehearse
from megatron_rl.rehearsal.summary import summary


def run(config: Config, network: Network, ranks: Sequence[int], *, json_file: str | None = None) -> None:
    """Rehearse each rank and say what was seen; `ranks` empty: one of each distinct kind."""
    check_layout(network, config.parallel)
    check_rehearsable(config)
    for rank in ranks:
        check_rank(rank, config.parallel)
    if json_file is not None and not Path(json_file).resolve().parent.is_dir():
        raise ValueError(f"--json {json_file}: there is no folder {Path(json_file).parent}")
    workload, rates = full_microbatches(config), Rates()
    chosen = list(ranks) or distinct_ranks(config.parallel)
    found: list[dict[str, Any]] = []
    for rank in chosen:
        found.append(summary(config, network, workload, rehearse(config, network, rank, workload), rates))
        gc.collect()  # modules and their optimiser hold each other
        print(rank_text(config, found[-1], rates), flush=True)
        print(flush=True)
    if len(found) > 1:
        print(stages_text(config, found))
    if json_file is not None:
        Path(json_file).write_text(json.dumps({"ranks": found}, indent=1) + "\n")


def full_microbatches(config: Config) -> Workload:
    """Micro-batches at their cap, of sequences of the mean length that `plan` expects; as many as fill the pipeline.

    A sequence has half the prompt's room and half of the longest response.
    """
    rollout, parallel = config.rollout, config.parallel
    room = config.batch.tokens_per_microbatch * parallel.cp
    mean = rollout.max_context_tokens / 2
    lengths = shares(room, max(1, round(room / mean)))
    if parallel.cp > 1:
        unit = 2 * parallel.cp
        lengths = [length // unit * unit for length in lengths]
    count = 1
    if parallel.pp > 1:
        step = parallel.pp if parallel.vpp else 1
        fill = chunks_in_flight(parallel, 0, expected_microbatches(config))
        count = -(-fill // ((parallel.vpp or 1) * step)) * step
    return Workload(tuple(lengths), count)
