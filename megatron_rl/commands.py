"""What each command of `megatron-rl` does: compose, check, start, stop."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rl.config.check import Sizes, check_rl, check_served_alone, check_sft, sft_summary, summary
from megatron_rl.config.load import load
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config, SFTConfig
from megatron_rl.launch.claim import claimed
from megatron_rl.launch.local import RunFailed, RunInterrupted, engines_for, run_ranks, terminable
from megatron_rl.launch.programs import EXIT_CODES
from megatron_rl.model.adapters import check_lora
from megatron_rl.model.backend import check_backend
from megatron_rl.model.network import check_layout
from megatron_rl.observe.say import say, warn
from megatron_rl.orchestrator.stages import stage_configs
from megatron_rl.preflight import (
    check_backends,
    check_data,
    check_folders,
    check_from_afar,
    check_functions,
    check_sft_start,
    check_start,
    model_is_here,
    model_rows,
    network_of,
    sizes_of,
    validate,
    warn_of_shared_gpus,
)
from megatron_rl.preflight_gpu import check_broadcast
from megatron_rl.runs import engine_errors, prepare_model, prepare_smollm2, train_rl, train_sft, write_run_report

__all__ = ["COMMANDS", "RunFailed", "RunInterrupted", "warn"]


def print_summary(config: Config, sizes: Sizes) -> None:
    names = [f"{config.run.name}: {stage.name}" for stage in config.stages] or [config.run.name]
    for name, each in zip(names, stage_configs(config), strict=True):
        print_rows(name, [*summary(each, sizes), *model_rows(each, network_of(each))])


def print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def rl(options) -> int:
    config = load(options.overrides)
    if not options.check:
        prepare_model(config)
    sizes = validate(config, start=not options.check)
    if options.check:
        looked_at = _look_at(config, check_start)
        print_summary(config, sizes)
        _print_valid(config, looked_at)
        return 0
    print_summary(config, sizes)
    return EXIT_CODES[train_rl(config).how]


def config(options) -> int:
    from megatron_rl.config.show import as_yaml, differences, named

    if options.view == "show":
        print(as_yaml(load(options.overrides)), end="")
        return 0
    if options.view == "explain":
        from megatron_rl.config.reference import explained

        Console(highlight=False, markup=False).print(explained(options.key))
        return 0
    left, right = named(options.left), named(options.right)
    table = Table("key", options.left, options.right)
    for key, *values in differences(left, right):
        table.add_row(key, *(json.dumps(value) for value in values))
    Console().print(table)
    return 0


def slurm(options) -> int:
    from megatron_rl.launch.slurm import job_folder, submit

    config = load(options.overrides)
    sizes = validate(config, start=not options.dry_run)
    warn_of_shared_gpus(config, slurm=True)
    job = config.slurm
    if job.gpus_per_node and not job.engine_nodes and not config.rollout.engine.urls:
        check_broadcast(config, config.parallel.world_size // job.nodes)
    if options.dry_run:
        print(submit(config, dry_run=True))
        return 0
    print_summary(config, sizes)
    check_start(config)
    job = submit(config, dry_run=False)
    Console().print(f"job {job}; its logs: {job_folder(config)}; stop it with scancel {job}")
    return 0


def torchrun(options) -> int:
    from megatron_rl.launch import by_hand

    machines = by_hand.Machines(options.nodes, options.master)
    config = by_hand.check(load(options.overrides), machines)
    sizes = validate(config, start=True)
    check_start(config)
    print_summary(config, sizes)
    with claimed(config.run.dir), engine_errors():
        ended = by_hand.run(config, machines, say)
    if ended.why:
        warn(f"the run ended early: {ended.why}")
    write_run_report([Path(config.run.dir)])
    return EXIT_CODES[ended.how]


def engine(options) -> int:
    from megatron_rl.launch import by_hand

    config = load(options.overrides)
    validate(config, start=True, exports=False)
    with terminable(), engine_errors():
        by_hand.serve_engines(config, lambda text: print(text, flush=True))
    return 0


def sft(options) -> int:
    config = load(options.overrides)
    network = network_of(config)
    check_layout(network, config.parallel)
    check_backends(config, network)
    sizes = sizes_of(network)
    check_sft(config, sizes)
    rows = [*sft_summary(config, sizes), *model_rows(config, network)]
    if options.check:
        looked_at = _look_at(config, check_sft_start)
        print_rows(config.run.name, rows)
        _print_valid(config, looked_at)
        return 0
    print_rows(config.run.name, rows)
    train_sft(config)
    return 0


def _look_at(config: Config, check: Callable[[Config], None]) -> str:
    """--check: what a start would be refused for, as far as this machine holds it. Says what was looked at."""
    if not model_is_here(config):
        check_from_afar(config)
        return f"configuration, layout and names; model.path={config.model.path or '(not set)'} is not here, so no data"
    check(config)
    return "configuration, layout, model, data and rewards; not: memory, GPUs, engines"


def _print_valid(config: Config, looked_at: str) -> None:
    say(f"valid: {config.run.name} on {config.parallel.world_size} ranks (looked at: {looked_at})")


def evaluate(options) -> int:
    from megatron_rl.recipes import evaluate as recipe

    config = load(options.overrides)
    check_served_alone(config)
    validate(config, start=True, exports=False)
    run_dir = Path(config.run.dir)
    check_data(config, training=False)
    with claimed(run_dir), terminable(), engine_errors(), \
            engines_for(config, config.model.path, run_dir / "engine.log") as served:
        measured = recipe.measure(served)
    Console().print(recipe.table(measured, config.model.path))
    Console().print(f"all numbers: {run_dir / recipe.RESULTS}; every response: {run_dir / recipe.SAMPLES}")
    return 0


def serve(options) -> int:
    from megatron_rl.recipes import serve as recipe

    config = load(options.overrides)
    check_served_alone(config)
    validate(config, start=True, exports=False)
    recipe.check(config)
    run_dir = Path(config.run.dir)

    def tell(gateway, key, session) -> None:
        print(f"export OPENAI_BASE_URL={gateway.url}/v1 OPENAI_API_KEY={session.key}\n"
              f"export ANTHROPIC_BASE_URL={gateway.url} ANTHROPIC_API_KEY={session.key}\n"
              f"export {config.rollout.agent.key_env}={key}\n"
              f"serving {config.model.path}; Ctrl-C ends it and writes {run_dir / recipe.CONVERSATIONS}", flush=True)

    with claimed(run_dir), terminable(), engine_errors(), \
            engines_for(config, config.model.path, run_dir / "engine.log") as served:
        recipe.run(served, tell)
    return 0


def data(options) -> int:
    """One step of curation: OUT/kept.jsonl, OUT/removed.jsonl with the reasons, OUT/report.json with the counts."""
    from megatron_rl.recipes import curation

    skip = ["data.on_error=skip"] if options.step == "clean" else []  # a bad row is one more thing to clean
    config = load([*options.overrides, *skip])
    with engine_errors():
        counts = curation.run(config, options)
    table = Table("rows", "number", title=f"{options.step} {config.data.path}")
    for name, count in counts.items():
        table.add_row(name, str(count))
    Console().print(table)
    return 0


def select_checkpoint(options) -> int:
    from megatron_rl.recipes import select_checkpoint as recipe

    config = load(options.overrides)
    with terminable(), engine_errors():
        decision = recipe.run(config, engines_for)
    Console().print(recipe.table(decision))
    Console().print(f"chosen: {decision.chosen} ({decision.why}); {recipe.folder(config)}")
    return 0


def convert(options) -> int:
    from megatron_rl.model.upcycle import upcycle

    if options.kind == "upcycle":
        upcycle(options.source, options.target, model_type=options.model_type, num_experts=options.experts,
                experts_per_token=options.experts_per_token)
    elif options.kind == "smollm2":
        prepare_smollm2(Path(options.target))
    else:
        config = load(options.overrides)
        merges, folder, rank = options.kind == "merge", config.model.lora.path, config.model.lora.rank
        require(not merges or folder is not None, "model.lora.path is not set: `convert merge` needs an adapter folder")
        require(merges or rank == 0, f"model.lora.rank={rank}: `convert roundtrip` takes no adapters; leave model.lora "
                "out, or use `convert merge`")
        network = network_of(config)
        check_layout(network, config.parallel)
        check_backends(config, network)
        check_folders(config, exports=True)
        run_ranks("convert", config)
        Console().print(f"{config.model.path} + {folder} -> {config.run.dir}/hf" if merges else
                        f"{config.model.path} -> Megatron ({config.parallel.world_size} ranks) -> {config.run.dir}/hf: "
                        "every tensor has the same sha256")
    return 0


def quickstart(options) -> int:
    from megatron_rl.recipes import quickstart as recipe

    config = load(["experiment=quickstart", *options.overrides])  # before its model is made and fine-tuned
    check_rl(config, None)
    check_functions(config)
    with terminable(), engine_errors():
        recipe.run(options.overrides, Console(), options.model)
    return 0


def ablate(options) -> int:
    from megatron_rl.ablations import command

    return command.run(options)


def pipeline(options) -> int:
    from megatron_rl.pipeline import command

    return command.run(options)


def plan(options) -> int:
    from megatron_rl.plan import Hardware, estimate, propose
    from megatron_rl.plan.report import GB, plan_text

    config = load([*options.overrides, *(["rollout.engine.colocate=true"] if options.colocated else [])])
    network = network_of(config)
    check_layout(network, config.parallel)
    check_backend(config.model, network, config.parallel, gpu=True)
    check_lora(config.model, network, gpu=True)
    hardware = Hardware(gpu_memory=options.gpu_memory * GB)
    engine = hardware.engine_bytes(config)
    given = estimate(network, config, hardware, engine_bytes=engine)
    print(plan_text(network, config, given, propose(network, config, hardware, engine_bytes=engine), hardware))
    return 0


READ_BY = {"calibrate": {"rates"}, "layouts": {"rates", "json"},
           "collectors": {"engines", "lengths", "imbalance", "rates", "json", "page"}}
"""Options of `rehearse` that say what it does instead, and the other options that each of them reads."""


def _refuse_unread(options) -> None:
    """ValueError for options of `rehearse` that the others leave without effect."""
    if options.engines and not options.collectors:
        raise ValueError(f"--engines {options.engines} says how many engines --collectors simulates; add it")
    names = ("calibrate", "layouts", "collectors", "engines", "lengths", "trace", "page", "json", "rates")
    given = [name for name in names if getattr(options, name)] + ["imbalance"] * (options.imbalance != "1")
    for mode, read in READ_BY.items():
        unread = sorted({*given} - read - {mode})
        if mode in given and unread:
            raise ValueError(f"--{mode} does not read --{unread[0]}: leave one of the two out")


def rehearse(options) -> int:
    config = dataclasses.replace(load(options.overrides), sft=SFTConfig())  # RL's step, whatever section sft says
    network = network_of(config)
    _refuse_unread(options)
    if options.calibrate:
        from megatron_rl.rehearsal.calibrate import calibrate
        from megatron_rl.rehearsal.rates import read_rates, write_rates

        write_rates(options.calibrate, calibrate(config, network, read_rates(options.rates)))
        return 0
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # fake tensors live on the CPU, and Megatron asks for a GPU if there is one
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # its hints on how to build models
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, about libraries that it can do without
        from megatron_rl.rehearsal import command

        if options.layouts:
            command.compare_layouts(config, network, count=options.layouts, rates_file=options.rates,
                                    json_file=options.json)
            return 0
        if options.collectors:
            command.compare_collectors(config, network, options.ranks, lengths=options.lengths,
                                       engines=options.engines, imbalance=options.imbalance,
                                       rates_file=options.rates, json_file=options.json, page_file=options.page)
            return 0
        command.run(config, network, options.ranks, json_file=options.json, imbalance=options.imbalance,
                    lengths=options.lengths, rates_file=options.rates, trace_file=options.trace,
                    page_file=options.page)
    return 0


def replay_step(options) -> int:
    """0 when the replayed loss and gradient norm are those of the run, bit for bit; 1 otherwise."""
    from megatron_rl.config.load import build
    from megatron_rl.observe import dump

    folder = Path(options.folder)
    record = dump.read_record(folder)
    config = build(record.config)
    model = dataclasses.replace(config.model, path=str(folder / dump.WEIGHTS)) if not config.model.lora.on else \
        dataclasses.replace(config.model, lora=dataclasses.replace(config.model.lora, path=str(folder / dump.ADAPTER)))
    run_ranks("replay", dataclasses.replace(
        config, run=dataclasses.replace(config.run, dir=str(folder)), model=model))
    replayed = json.loads((folder / dump.RESULT).read_text())
    same = True
    print(f"optimiser step {record.step}, {'skipped' if record.skipped else 'taken'} by the run")
    for name in ("loss", "grad_norm"):
        before, now = getattr(record, name), replayed[name]
        equal = before == now or (math.isnan(before) and math.isnan(now))
        same = same and equal
        print(f"{name:<10} run {before!r}  replay {now!r}  {'equal' if equal else 'DIFFERENT'}")
    print("\n".join(["not finite, first of each kind in the order of computing:", *replayed["first"]]
                    if replayed["first"] else ["every value is finite"]))
    return 0 if same else 1


def report(options) -> int:
    runs = [Path(run) for run in options.runs]
    if options.out and Path(options.out).is_dir():
        raise ValueError(f"--out {options.out} is a folder: name a file, such as {options.out}/report.html")
    write_run_report(runs, Path(options.out) if options.out else None)
    return 0


def doctor(options) -> int:
    from megatron_rl.doctor import run_doctor

    return run_doctor()


def completion(options) -> int:
    from megatron_rl.completion import script

    print(script(options.shell, options.top), end="")
    return 0


COMMANDS = {"rl": rl, "sft": sft, "evaluate": evaluate, "serve": serve, "convert": convert, "plan": plan,
            "rehearse": rehearse, "replay-step": replay_step,
            "ablate": ablate, "pipeline": pipeline, "quickstart": quickstart, "report": report, "data": data,
            "select-checkpoint": select_checkpoint, "config": config, "slurm": slurm, "torchrun": torchrun,
            "engine": engine, "doctor": doctor,
            "completion": completion}
