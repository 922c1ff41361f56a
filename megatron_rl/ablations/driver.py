"""Runs an ablation: supervised starts once, then every (seed, arm) by itself; what is finished is not run again.

Folders under <out>/<ablation>/<scale>: init/ (random weights), starts/<start>/, <arm>/seed_<n>/. Whether a run is
finished is read from its own files, so an interrupted ablation goes on with the same command.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_rl.ablations.spec import Ablation, Scale
from megatron_rl.config.check import check_evaluates
from megatron_rl.config.load import from_json, load
from megatron_rl.config.resume import changed
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.launch.local import engines_for, terminable
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.sinks import CONFIG, EVALUATIONS, METRICS
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.runs import engine_errors, prepare_model, train_rl, train_sft


@dataclass(frozen=True)
class Run:
    """One run of the ablation; arm None is a supervised start."""

    arm: str | None
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def steps(self) -> int:
        return self.config.sft.total_steps if self.arm is None else self.config.run.steps

    def finished(self) -> bool:
        """All steps logged, and what comes after the last one done. ValueError: the folder holds another run."""
        self._check_same_run()
        if self.arm is None:
            return _last_step(self.folder / METRICS) == self.steps and (self.folder / "hf" / "config.json").is_file()
        return _last_step(self.folder / EVALUATIONS) == self.steps

    def begun(self) -> bool:
        return _last_step(self.folder / METRICS) is not None

    def _check_same_run(self) -> None:
        path = self.folder / CONFIG
        if path.is_file():
            other = changed(from_json(path), self.config)
            require(not other, f"{self.folder} holds a run of another configuration, different in "
                    f"{', '.join(key for key, *_ in other)}: remove that folder, or choose another with out=FOLDER")


@dataclass(frozen=True)
class Plan:
    """The supervised runs and the arms' runs, seed by seed, so that an early stop leaves whole comparisons."""

    root: Path
    starts: tuple[Run, ...]
    runs: tuple[Run, ...]


def plan(name: str, scale_name: str, scale: Scale, *, out: Path, seeds: Sequence[int], arms: Sequence[str],
         overrides: Sequence[str] = (), start: str | None = None) -> Plan:
    """The runs of some arms of `scale`, composed. start: a checkpoint for all instead of the supervised runs.

    ValueError: as the configuration raises it, or an arm that is not there.
    """
    unknown = [arm for arm in arms if arm not in scale.arms]
    require(not unknown, f"arms={','.join(unknown)}: {name}, scale {scale_name} has {', '.join(scale.arms)}")
    root = out / name / scale_name
    needed = {scale.arms[arm].start for arm in arms}
    used = {} if start else {key: settings for key, settings in scale.starts.items() if key in needed}
    starts = tuple(Run(None, 0, load([*settings, "run.seed=0", f"run.name={key}", f"run.dir={root / 'starts' / key}",
                                      f"model.path={root / 'init'}", "observe.wandb=off"]))
                   for key, settings in used.items())
    runs = []
    for seed in seeds:
        for key in arms:
            arm = scale.arms[key]
            model = start or (arm.start and str(root / "starts" / arm.start / "hf"))
            runs.append(Run(key, seed, load([
                *scale.common, *arm.overrides, *([f"model.path={model}"] if model else []), f"run.seed={seed}",
                f"run.name={key}_seed_{seed}", f"run.dir={root / key / f'seed_{seed}'}", "run.export_hf=false",
                "observe.wandb=off", *overrides])))
            check_evaluates(runs[-1].config, "an ablation")
    return Plan(root, starts, tuple(runs))


def run_starts(todo: Plan, console: Console) -> None:
    """The supervised runs that are not finished, and the model that the arms begin with where the project makes it."""
    if any(not run.finished() for run in todo.starts) and not (todo.root / "init" / "config.json").is_file():
        todo.root.mkdir(parents=True, exist_ok=True)
        make_random_model(todo.root / "init", seed=0)
    for run in todo.starts:
        if not run.finished():
            console.print(f"[bold]start {run.config.run.name}[/bold]: {run.steps} supervised steps in {run.folder}")
            train_sft(continued(run))
    prepare_model(todo.runs[0].config)


def run_all(ablation: Ablation, todo: Plan, console: Console) -> None:
    """Everything of the plan that is not finished. RunFailed or RunInterrupted leave a state that this goes on from."""
    run_starts(todo, console)
    waiting = [run for run in todo.runs if not run.finished()]
    console.print(f"{len(todo.runs) - len(waiting)} of {len(todo.runs)} runs are finished")
    number = 0
    for runs in sharing_engines(waiting):
        first = runs[0].config
        with terminable(), engine_errors(), engines_for(first, first.model.path, engine_log(todo)) as served:
            for run in runs:
                number += 1
                console.print(f"[bold]{number} of {len(waiting)}[/bold]: {ablation.arms[run.arm]}, seed {run.seed}, "
                              f"{run.steps} steps in {run.folder}")
                config = continued(run)
                engine = dataclasses.replace(config.rollout.engine, urls=served.rollout.engine.urls)
                train_rl(dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=engine)))


def sharing_engines(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in their order, neighbours together that the same engines can serve."""
    def needs(run: Run) -> tuple:
        rollout = run.config.rollout
        return rollout.engine, rollout.max_context_tokens, run.config.model.dtype, run.config.algo.router_replay

    return [list(group) for _, group in itertools.groupby(runs, key=needs)]


def continued(run: Run) -> Config:
    """The run's configuration, told to go on if it was begun."""
    return dataclasses.replace(run.config, run=dataclasses.replace(run.config.run, resume="auto"))


def engine_log(todo: Plan) -> Path:
    """The engine's log for a plan of one run, in that run's folder, because it may have neighbours at work."""
    folder = todo.root if len(todo.runs) > 1 else todo.runs[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "engine.log"


def _last_step(path: Path) -> int | None:
    rows = read_jsonl(path) if path.is_file() else []
    return rows[-1]["step"] if rows else None
