"""Runs the stages that are not finished, one engine for all of them, and evaluates the model that each leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_rl.config.schema import Config
from megatron_rl.launch.claim import claimed
from megatron_rl.launch.local import RunFailed, RunInterrupted, engines_for, terminable
from megatron_rl.pipeline.check import check_memories, check_start
from megatron_rl.pipeline.plan import Plan, Stage
from megatron_rl.pipeline.record import Record, begin, finish, made_from, records, unfinished
from megatron_rl.pipeline.report import write_result
from megatron_rl.recipes import evaluate, select_checkpoint
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.rollout.fleet import FleetError
from megatron_rl.runs import engine_errors, train_rl, train_sft


def run(plan: Plan, console: Console) -> Path:
    """Everything that is not finished; returns the report's path. RunFailed and RunInterrupted leave a state from
    which this goes on."""
    found = records(plan)
    waiting = unfinished(found)
    if not waiting:
        console.print(f"all {len(plan.stages)} stages are finished")
        return write_result(plan, found)
    if done := len(plan.stages) - len(waiting):
        console.print(f"{done} of {len(plan.stages)} stages are finished")
    base = plan.stages[0]
    if not plan.whole.model.path and (found[0] is None or not has_model(base)):
        make_random_model(base.model, plan.whole.run.seed)
    check_start(plan, waiting)
    check_memories(plan, waiting)
    current = plan.stages[waiting[0]]
    try:
        with claimed(plan.folder), terminable(), engine_errors(), \
                engines_for(plan.engine_config, str(base.model), plan.folder / "engine.log") as served:
            for place in waiting:
                current = plan.stages[place]
                console.rule(f"[bold]{place + 1} of {len(plan.stages)}: {current.title}[/bold]")
                found[place] = run_stage(plan, current, made_from(plan, current, found), found[place], served, console)
                report = write_result(plan, found)
    except (RunInterrupted, KeyboardInterrupt):
        raise RunInterrupted(f"stopped in stage {current.name}; the same command goes on there") from None
    except (RunFailed, FleetError) as error:
        raise RunFailed(f"stage {current.name}: {error}\nWhen the cause is gone, the same pipeline command goes on "
                        "there") from error
    return report


def run_stage(plan: Plan, stage: Stage, after: str | None, earlier: Record | None, served: Config,
              console: Console) -> Record:
    """after: Record.after; earlier: its own record of a start that did not end."""
    record, seconds = begin(stage, after, earlier), {}
    with timed(seconds, "train"):
        make_model(stage, served, console)
    with timed(seconds, "evaluate"):
        evaluation = evaluate_model(plan, stage, served, console)
    return finish(stage, record, evaluation, seconds)


def has_model(stage: Stage) -> bool:
    """Whether it is there whole: a model's folder appears under its name when all of it is written."""
    return (stage.model / "config.json").is_file()


def make_model(stage: Stage, served: Config, console: Console) -> None:
    """Train or choose, unless that was done when an earlier start was stopped."""
    if has_model(stage):
        return
    config = stage.config
    engine = dataclasses.replace(config.rollout, engine=served.rollout.engine)
    config = dataclasses.replace(config, rollout=engine, run=dataclasses.replace(config.run, resume="auto"))
    if stage.recipe == "sft":
        train_sft(config)
    elif stage.recipe == "rl":
        train_rl(config)
    else:
        choose(stage, served, console)


def choose(stage: Stage, served: Config, console: Console) -> None:
    """Link the chosen epoch as this stage's model."""

    @contextlib.contextmanager
    def loaded(config: Config, path: str, _: Path) -> Iterator[Config]:
        console.print(f"sampling from {path}")
        config = dataclasses.replace(
            config, rollout=dataclasses.replace(config.rollout, engine=served.rollout.engine))
        with evaluate.serving_model(config, Path(path)):
            yield config

    own = dataclasses.replace(stage.config.rollout.engine, urls=())
    config = dataclasses.replace(stage.config, rollout=dataclasses.replace(stage.config.rollout, engine=own))
    decision = select_checkpoint.run(config, loaded)
    console.print(select_checkpoint.table(decision))
    console.print(f"chosen: {decision.chosen} ({decision.why})")
    target, link = Path(decision.chosen).resolve(), stage.model.with_name("hf.partial")
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent.resolve()))
    os.replace(link, stage.model)


def evaluate_model(plan: Plan, stage: Stage, served: Config, console: Console) -> dict[str, Any]:
    """Set -> values of the stage's model; all responses in <stage>/evaluation."""
    whole = plan.whole
    config = dataclasses.replace(
        whole, model=dataclasses.replace(whole.model, path=str(stage.model)),
        run=dataclasses.replace(whole.run, dir=str(stage.folder / "evaluation")),
        rollout=dataclasses.replace(whole.rollout, engine=served.rollout.engine))
    with evaluate.serving_model(config, stage.model):
        measured = evaluate.measure(config)
    shown = Table("set", "accuracy", "95% interval", "problems", title="the model is right in")
    for each in measured:
        values = each.values
        accuracy, interval = ("-", "-") if "accuracy" not in values else (
            f"{values['accuracy']:.3f}", f"{values['low']:.3f} - {values['high']:.3f}")
        shown.add_row(each.name, accuracy, interval, f"{values['problems']} x {values['samples_per_problem']}")
    console.print(shown)
    return {each.name: each.values for each in measured}


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
