"""`megatron-rl rehearse`: which ranks, which micro-batch; text to the screen, JSON to a file."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import Config
from megatron_rl.model.network import Network, check_layout
from megatron_rl.observe.say import say
from megatron_rl.plan import Hardware, Proposal, propose
from megatron_rl.plan.activations import chunks_in_flight
from megatron_rl.plan.memory import expected_microbatches
from megatron_rl.plan.report import layout
from megatron_rl.rehearsal.page import rehearsal_page
from megatron_rl.rehearsal.ranks import check_rank, distinct_ranks
from megatron_rl.rehearsal.report import layouts_text, rank_text, stages_text
from megatron_rl.rehearsal.roofline import Rates
from megatron_rl.rehearsal.standins import shares
from megatron_rl.rehearsal.step import Workload, check_rehearsable, rehearse
from megatron_rl.rehearsal.summary import summary
from megatron_rl.rehearsal.timeline import Event, perfetto, simulate, waiting_share


def run(config: Config, network: Network, ranks: Sequence[int], *, json_file: str | None = None,
        imbalance: float = 1.0, trace_file: str | None = None, page_file: str | None = None) -> None:
    """Rehearse each rank and say what was seen; `ranks` empty: one of each distinct kind.

    trace_file: the update of all of them on one clock, for ui.perfetto.dev. page_file: everything as an HTML page.
    """
    check_layout(network, config.parallel)
    check_rehearsable(config, imbalance)
    for rank in ranks:
        check_rank(rank, config.parallel)
    for option, file in (("--json", json_file), ("--trace", trace_file), ("--page", page_file)):
        if file is not None:
            _check_folder(option, file)
    workload, rates = full_microbatches(config), Rates()
    chosen = list(ranks) or distinct_ranks(config.parallel)
    found: list[dict[str, Any]] = []
    updates: dict[int, list[Event]] = {}
    for rank in chosen:
        seen = rehearse(config, network, rank, workload, imbalance=imbalance)
        found.append(summary(config, network, workload, seen, rates) | {"imbalance": imbalance})
        updates[rank] = [event for event in seen.recorder.events if event.phase == "update"]
        del seen
        gc.collect()  # modules and their optimiser hold each other
        print(rank_text(config, found[-1], rates), flush=True)
        print(flush=True)
    slices = simulate(updates, rates)
    if len(found) > 1:
        print(stages_text(config, found, waiting_share(slices)))
    if trace_file is not None:
        names = {each["rank"]: f"rank {each['rank']}, stage {each['place']['pp']}" for each in found}
        Path(trace_file).write_text(json.dumps(perfetto(slices, names)) + "\n")
    if page_file is not None:
        Path(page_file).write_text(rehearsal_page(config, found, slices, rates), encoding="utf-8")
        say(f"page: {page_file}")
    if json_file is not None:
        Path(json_file).write_text(json.dumps({"ranks": found}, indent=1) + "\n")


def compare_layouts(config: Config, network: Network, *, count: int, json_file: str | None = None) -> None:
    """The layouts that `plan` proposes and the one asked about, rehearsed and ordered by their seconds.

    The ranks of the first and the last stage of each layout are rehearsed; the slower one sets the pace.
    """
    check_layout(network, config.parallel)
    check_rehearsable(config)
    if json_file is not None:
        _check_folder("--json", json_file)
    proposed = [variant_of(config, each) for each in propose(network, config, Hardware(), count=count)]
    variants = [config, *(each for each in proposed if layout_name(each) != layout_name(config))]
    found = []
    for index, variant in enumerate(variants):
        workload, rates = full_microbatches(variant), Rates()
        ranks = distinct_ranks(variant.parallel)
        seen = []
        for rank in sorted({ranks[0], ranks[-1]}):
            seen.append(summary(variant, network, workload, rehearse(variant, network, rank, workload), rates))
            gc.collect()
        found.append({"layout": layout_name(variant), "asked": index == 0, "ranks": seen})
        print(f"rehearsed {layout_name(variant)}", flush=True)
    print(layouts_text(found, Rates()))
    if json_file is not None:
        Path(json_file).write_text(json.dumps({"layouts": found}, indent=1) + "\n")


def variant_of(config: Config, proposal: Proposal) -> Config:
    """`config` in the proposed layout, with Phi over the whole cluster as it is."""
    algo = dataclasses.replace(config.algo, scope="global", phi=config.algo.phi_global(config.parallel.dp))
    return dataclasses.replace(config, parallel=proposal.parallel, algo=algo,
                               model=dataclasses.replace(config.model, recompute=proposal.recompute))


def layout_name(config: Config) -> str:
    return f"{layout(config.parallel)} recompute={config.model.recompute}"


def _check_folder(option: str, file: str) -> None:
    if not Path(file).resolve().parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {Path(file).parent}")


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
