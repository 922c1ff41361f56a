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
from megatron_rl.plan.report import layout
from megatron_rl.rehearsal.page import collectors_page, rehearsal_page
from megatron_rl.rehearsal.ranks import check_rank, distinct_ranks
from megatron_rl.rehearsal.rates import read_rates
from megatron_rl.rehearsal.records import Lengths, lengths_of, loads_of
from megatron_rl.rehearsal.report import collectors_text, layouts_text, rank_text, stages_text
from megatron_rl.rehearsal.standins import Imbalance
from megatron_rl.rehearsal.step import check_rehearsable, rehearse
from megatron_rl.rehearsal.summary import summary
from megatron_rl.rehearsal.timeline import Event, perfetto, simulate, waiting_share
from megatron_rl.rehearsal.whole_step import engine_of, variants, whole_steps
from megatron_rl.rehearsal.workload import full_microbatches, tokens_per_update, workload_of


def run(config: Config, network: Network, ranks: Sequence[int], *, json_file: str | None = None,
        imbalance: str = "1", lengths: str | None = None, rates_file: str | None = None,
        trace_file: str | None = None, page_file: str | None = None) -> None:
    """Rehearse each rank and say what was seen; `ranks` empty: one of each distinct kind.

    imbalance: a number, or a run's folder (records.loads_of). lengths: as records.lengths_of; None: full micro-batches.
    rates_file: as rates.read_rates. trace_file: the update of all of them on one clock, for ui.perfetto.dev.
    page_file: everything as an HTML page.
    """
    check_layout(network, config.parallel)
    uneven = _imbalance(imbalance, network)
    check_rehearsable(config, uneven)
    drawn = None if lengths is None else lengths_of(lengths, config.rollout)
    for rank in ranks:
        check_rank(rank, config.parallel)
    for option, file in (("--json", json_file), ("--trace", trace_file), ("--page", page_file)):
        if file is not None:
            _check_folder(option, file)
    rates = read_rates(rates_file)
    chosen = list(ranks) or distinct_ranks(config.parallel)
    found: list[dict[str, Any]] = []
    updates: dict[int, list[Event]] = {}
    for rank in chosen:
        workload = workload_of(config, network, rank, drawn)
        seen = rehearse(config, network, rank, workload, imbalance=uneven)
        found.append(summary(config, network, workload, seen, rates.ranks) | {
            "imbalance": uneven, "sources": _sources(imbalance, uneven, drawn)})
        updates[rank] = [event for event in seen.recorder.events if event.phase == "update"]
        del seen
        gc.collect()  # modules and their optimiser hold each other
        print(rank_text(config, found[-1], rates), flush=True)
        print(flush=True)
    slices = simulate(updates, rates.ranks)
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


def compare_collectors(config: Config, network: Network, ranks: Sequence[int], *, lengths: str | None = None,
                       engines: int | None = None, imbalance: str = "1", rates_file: str | None = None,
                       json_file: str | None = None, page_file: str | None = None) -> None:
    """The whole RL step with every collector: the ranks' step is rehearsed, then engines and loop are simulated.

    lengths None: uniform. engines: how many stand apart from the ranks; None: on as many GPUs as the ranks have.
    """
    check_layout(network, config.parallel)
    uneven = _imbalance(imbalance, network)
    check_rehearsable(config, uneven)
    drawn = lengths_of(lengths or "uniform", config.rollout)
    for option, file in (("--json", json_file), ("--page", page_file)):
        if file is not None:
            _check_folder(option, file)
    rates = read_rates(rates_file)
    count = engines or max(1, config.parallel.world_size // config.rollout.engine.tp)
    variants(config), engine_of(network, config, drawn, rates.engine)  # refuse what cannot be simulated
    found = []
    for rank in ranks or distinct_ranks(config.parallel):
        check_rank(rank, config.parallel)
        workload = workload_of(config, network, rank, drawn)
        found.append(summary(config, network, workload, rehearse(config, network, rank, workload, imbalance=uneven),
                             rates.ranks))
        gc.collect()
    seconds = max(sum(each["step_seconds"].values()) for each in found)
    tokens = tokens_per_update(config, drawn)
    say(f"one optimiser step of {tokens:,} response tokens takes {seconds:.1f} s")
    rows = whole_steps(config, network, drawn, train_s_per_token=seconds / tokens, engines=count,
                       rates=rates.ranks, engine_rates=rates.engine)
    assumed = [f"responses {drawn.name}; judging takes no time", rates.engine.stated(), f"ranks: {rates.stated()}"]
    print(collectors_text(rows, assumed))
    if page_file is not None:
        Path(page_file).write_text(collectors_page(config, rows, assumed), encoding="utf-8")
        say(f"page: {page_file}")
    if json_file is not None:
        Path(json_file).write_text(json.dumps({"collectors": rows, "assumed": assumed, "optimiser_step_s": seconds,
                                               "engine_rates": dataclasses.asdict(rates.engine),
                                               "rates": dataclasses.asdict(rates.ranks)}, indent=1) + "\n")


def _imbalance(text: str, network: Network) -> Imbalance:
    try:
        return float(text)
    except ValueError:
        return loads_of(text, network)


def _sources(imbalance: str, uneven: Imbalance, lengths: Lengths | None) -> dict[str, str]:
    """Where the experts' rows and the lengths come from, for people."""
    if isinstance(uneven, float):
        experts = f"this rank's get {uneven:g} times the mean of rows"
    else:
        experts = (f"the busiest of each layer stands here and gets {min(uneven.values()):.2f} to "
                   f"{max(uneven.values()):.2f} times the mean of rows, as in {imbalance}")
    return {"experts": experts,
            "lengths": "full micro-batches of equal sequences" if lengths is None else f"responses {lengths.name}"}


def compare_layouts(config: Config, network: Network, *, count: int, rates_file: str | None = None,
                    json_file: str | None = None) -> None:
    """The layouts that `plan` proposes and the one asked about, rehearsed and ordered by their seconds.

    The ranks of the first and the last stage of each layout are rehearsed; the slower one sets the pace.
    """
    check_layout(network, config.parallel)
    check_rehearsable(config)
    if json_file is not None:
        _check_folder("--json", json_file)
    rates = read_rates(rates_file)
    hardware = Hardware()
    proposed = [variant_of(config, each) for each in propose(
        network, config, hardware, engine_bytes=hardware.engine_bytes(config), count=count)]
    variants = [config, *(each for each in proposed if layout_name(each) != layout_name(config))]
    found = []
    for index, variant in enumerate(variants):
        workload = full_microbatches(variant)
        ranks = distinct_ranks(variant.parallel)
        seen = []
        for rank in sorted({ranks[0], ranks[-1]}):
            seen.append(summary(variant, network, workload, rehearse(variant, network, rank, workload), rates.ranks))
            gc.collect()
        found.append({"layout": layout_name(variant), "asked": index == 0, "ranks": seen})
        print(f"rehearsed {layout_name(variant)}", flush=True)
    print(layouts_text(found, rates))
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
