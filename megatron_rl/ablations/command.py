"""`megatron-rl ablate EXAMPLE [scale=... seeds=... arms=... out=... start=... key=value ...]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rl.ablations.driver import Plan, Run, continued, plan, run_all, run_starts
from megatron_rl.ablations.report import publish, write_result
from megatron_rl.ablations.spec import Ablation, load_ablation
from megatron_rl.config.check import check_rl, check_sft
from megatron_rl.config.resources import SOURCE_TREE
from megatron_rl.config.rules import require
from megatron_rl.launch.local import RunInterrupted
from megatron_rl.launch.slurm import submit
from megatron_rl.preflight import check_functions, validate

OUT = "runs/ablations"
OWN_SETTINGS = ("scale", "seeds", "arms", "out", "start")


@dataclass(frozen=True)
class Planned:
    """What the settings of the command ask for. folder: where the result goes."""

    ablation: Ablation
    plan: Plan
    scale: str
    folder: Path


def planned(name: str, settings: Sequence[str]) -> Planned:
    """ValueError as the ablation and the configuration raise it, or a scale that is not there."""
    ablation = load_ablation(name)
    own, overrides = split_settings(settings)
    scale_name, out = own.get("scale", "tiny"), Path(own.get("out", OUT))
    if scale_name not in ablation.scales:
        raise ValueError(f"scale={scale_name}: {name} has {', '.join(ablation.scales)}")
    scale = ablation.scales[scale_name]
    todo = plan(ablation.same_runs_as or name, scale_name, scale, out=out, start=own.get("start"),
                seeds=seeds_of(own["seeds"]) if "seeds" in own else scale.seeds,
                arms=own["arms"].strip("[]").split(",") if "arms" in own else list(scale.arms), overrides=overrides)
    return Planned(ablation, todo, scale_name, out / name / scale_name)


def run(options) -> int:
    """Run what is not finished, write the result, and with --readme put it into the example's README."""
    asked = planned(options.name, options.settings)
    require(not options.readme or SOURCE_TREE is not None,
            "--readme writes into the source tree's examples, and this program is an installed package: leave it out")
    if not options.collect:
        check_runs(asked.plan)
    if options.check:
        check(asked.ablation, asked.plan)
        return 0
    if options.slurm:
        submit_all(asked.plan)
        return 0
    if not options.collect:
        try:
            run_what_is_missing(options, asked)
        except RunInterrupted:
            raise RunInterrupted("stopped; the same command goes on with what is not finished") from None
    text = write_result(asked.ablation, asked.plan, asked.folder, scale=asked.scale,
                        command=" ".join(["megatron-rl ablate", options.name, *options.settings]))
    if text is None:
        raise ValueError(f"{asked.plan.root}: no seed is finished in every arm yet")
    print(text)
    if options.readme:
        print(f"written: {publish(options.name, asked.folder, scale=asked.scale)}")
    return 0


def run_what_is_missing(options, asked: Planned) -> None:
    """All of it here with one engine, or what comes before the arms here and a job for each arm and seed."""
    if options.multirun is None:
        run_all(asked.ablation, asked.plan, Console())
        return
    from megatron_rl.ablations.multirun import multirun  # Hydra's application

    run_starts(asked.plan, Console())
    multirun(options.multirun, options.name, options.settings, asked.plan)


def split_settings(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The ablation's own settings, and overrides of the configuration."""
    pairs = [text.partition("=") for text in settings]
    own = {key: value for key, _, value in pairs if key in OWN_SETTINGS}
    return own, [text for text, (key, _, _) in zip(settings, pairs, strict=True) if key not in OWN_SETTINGS]


def seeds_of(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.strip("[]").split(",")]
    except ValueError:
        raise ValueError(f"seeds={text} must be numbers with commas between them, like seeds=0,1,2") from None


def check(ablation: Ablation, todo: Plan) -> None:
    """Print every run, start nothing."""
    table = Table("arm", "seed", "Phi", "steps", title=str(todo.root))
    for each in todo.runs:
        algo = each.config.algo
        budgeted = each.recipe == "rl" and algo.has_budget
        phi = f"{algo.phi_global(each.config.parallel.dp):,}" if budgeted else "no budget"
        table.add_row(ablation.arms[each.arm], str(each.seed), phi, str(each.steps))
    Console().print(table)


def check_runs(todo: Plan) -> None:
    """ValueError naming the run and the key of the first rule that does not hold. Seeds are alike. A model that a start
    will make has no sizes yet."""
    for each in (*todo.starts, *{run.arm: run for run in todo.runs}.values()):
        model = each.config.model
        try:
            if each.recipe == "sft":
                check_sft(each.config, None)
            elif model.architecture or (Path(model.path) / "config.json").is_file():
                validate(each.config, start=False)
            else:
                check_rl(each.config, None)
                check_functions(each.config)
        except ValueError as error:
            raise ValueError(f"{each.arm or each.config.run.name}: {error}") from error


def submit_all(todo: Plan) -> None:
    """One Slurm job per run that is not finished (section slurm of the configuration); --collect comes after them."""
    waiting: list[Run] = [each for each in todo.runs if not each.finished()]
    if any(not start.finished() for start in todo.starts):
        raise ValueError("the runs under starts and prepared come first: run them on one machine; start=CHECKPOINT "
                         "stands for the starts")
    for each in waiting:
        require(each.recipe == "rl", f"arm {each.arm} is supervised, and --slurm submits RL runs: run it without")
    for each in waiting:
        print(f"{each.folder}: job {submit(continued(each), dry_run=False)}")
