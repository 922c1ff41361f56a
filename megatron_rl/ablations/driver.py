"""Runs an ablation: starts and prepared runs once, then every (seed, arm) by itself; what is finished is not run again.

Folders under <out>/<ablation>/<scale>: init/ (random weights), starts/<name>/, <arm>/seed_<n>/. Whether a run is
finished is read from its own files, so an interrupted ablation goes on with the same command.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_rl.ablations.spec import Ablation, Arm, Scale
from megatron_rl.config.check import check_evaluates
from megatron_rl.config.distillation import teachers_at
from megatron_rl.config.load import from_json, load, to_dict
from megatron_rl.config.resume import changed
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.launch.claim import claimed
from megatron_rl.launch.local import engines_for, terminable
from megatron_rl.observe.files import write_json, write_whole
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.sinks import CONFIG, EVALUATIONS, METRICS
from megatron_rl.prompts import heldout_data
from megatron_rl.recipes import evaluate
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.runs import engine_errors, prepare_model, train_rl, train_sft


@dataclass(frozen=True)
class Run:
    """One run of the ablation; arm None is one that comes before the arms. recipe: Arm.recipe."""

    arm: str | None
    seed: int
    config: Config
    recipe: str = "rl"

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def steps(self) -> int:
        return self.config.sft.total_steps if self.recipe == "sft" else self.config.run.steps

    def finished(self) -> bool:
        """What comes after the last step is done: an export, or the last evaluation. A plateau, or no more prompts that
        teach, may end a run before run.steps. ValueError: the folder holds another run."""
        self._check_same_run()
        if self.recipe == "evaluate":
            return (self.folder / evaluate.RESULTS).is_file()
        if self.arm is None:
            return (self.folder / "hf" / "config.json").is_file()
        last = _last_row(self.folder / EVALUATIONS)
        return last is not None and (last["step"] == self.steps or last.get("label") == "after_rl")

    def begun(self) -> bool:
        return _last_row(self.folder / METRICS) is not None

    def _check_same_run(self) -> None:
        path = self.folder / CONFIG
        if path.is_file():
            other = changed(from_json(path), self.config)
            require(not other, f"{self.folder} holds a run of another configuration, different in "
                    f"{', '.join(key for key, *_ in other)}: remove that folder, or choose another with out=FOLDER")


@dataclass(frozen=True)
class Plan:
    """The runs before the arms in their order; the arms' runs, seed by seed, so that an early stop leaves whole
    comparisons."""

    root: Path
    starts: tuple[Run, ...]
    runs: tuple[Run, ...]


def plan(name: str, scale_name: str, scale: Scale, *, out: Path, seeds: Sequence[int], arms: Sequence[str],
         overrides: Sequence[str] = (), start: str | None = None) -> Plan:
    """The runs of some arms of `scale` and what these need, composed. start: a checkpoint instead of the supervised
    starts, also for what has no start.

    ValueError: as the configuration raises it, or an arm that is not there.
    """
    unknown = [arm for arm in arms if arm not in scale.arms]
    require(not unknown, f"arms={','.join(unknown)}: {name}, scale {scale_name} has {', '.join(scale.arms)}")
    root = out / name / scale_name
    before = {key: Arm("sft", overrides=settings) for key, settings in scale.starts.items()} | scale.prepared
    folders = {key: root / "starts" / key for key in before}
    models = {key: Path(start) if start and key in scale.starts else folders[key] / "hf" for key in before}

    def given(run: Arm) -> list[str]:
        """Overrides that follow from the runs that `run` needs."""
        model = models[run.start] if run.start else start
        texts = [f"model.path={model}"] if model else []
        if run.teachers:
            texts += teachers_at(run.teachers, models)
        if run.responses_of:
            texts += ["data.source=jsonl", f"data.path={folders[run.responses_of] / evaluate.SAMPLES}",
                      "data.response_key=text", "data.split=all"]
        return texts

    runs = []
    for seed, key in itertools.product(seeds, arms):
        arm = scale.arms[key]
        config = load([
            *scale.common, *arm.overrides, *given(arm), f"run.seed={seed}", f"run.name={key}_seed_{seed}",
            f"run.dir={root / key / f'seed_{seed}'}", f"run.export_hf={str(arm.recipe == 'sft').lower()}",
            "observe.wandb=off", *overrides])
        if arm.responses_of:  # which are to be learned; the problems of its evaluation are not theirs
            problems = heldout_data(load([*scale.common, *arm.overrides, *overrides]))
            config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, data=problems))
        check_evaluates(config, "an ablation")
        runs.append(Run(key, seed, config, arm.recipe))
    starts = []
    for key in needed([scale.arms[arm] for arm in arms], before):
        if start and key in scale.starts:
            continue
        texts = [f"model.path={root / 'init'}"] if key in scale.starts else given(before[key])
        starts.append(Run(None, 0, load([*before[key].overrides, *texts, "run.seed=0", f"run.name={key}",
                                         f"run.dir={folders[key]}", "observe.wandb=off"]), before[key].recipe))
    return Plan(root, tuple(starts), tuple(runs))


def needed(arms: Sequence[Arm], before: Mapping[str, Arm]) -> list[str]:
    """The runs of `before`, in its order, that `arms` need or that these need."""
    found: set[str] = set()
    waiting = list(arms)
    while waiting:
        run = waiting.pop()
        new = run.needs - found
        found |= new
        waiting += [before[key] for key in new]
    return [key for key in before if key in found]


def run_starts(todo: Plan, console: Console) -> None:
    """The runs before the arms that are not finished, and the models that the project makes."""
    init = todo.root / "init"
    if any(run.config.model.path == str(init) and not run.finished() for run in todo.starts) \
            and not (init / "config.json").is_file():
        todo.root.mkdir(parents=True, exist_ok=True)
        make_random_model(init, seed=0)
    for run in (*todo.starts, todo.runs[0]):
        prepare_model(run.config)
    for run in todo.starts:
        if run.finished():
            continue
        console.print(f"[bold]{run.config.run.name}[/bold], before the arms: {run.recipe} in {run.folder}")
        config = continued(run)
        if run.recipe == "sft":
            train_sft(config)
        elif run.recipe == "rl":
            train_rl(config)
        else:
            sample(config)


def sample(config: Config) -> None:
    """A run of recipe evaluate: the responses are in <run.dir>/evaluation_samples.jsonl."""
    folder = Path(config.run.dir)
    with claimed(folder), terminable(), engine_errors(), \
            engines_for(config, config.model.path, folder / "engine.log") as served, \
            evaluate.serving_model(served, Path(config.model.path)):  # given engines hold another
        write_json(folder / CONFIG, to_dict(config))
        evaluate.measure(served)


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
                config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=engine))
                if run.recipe == "sft":
                    train_sft_and_evaluate(config)
                else:
                    train_rl(config)


def train_sft_and_evaluate(config: Config) -> None:
    """A supervised arm. Writes eval.jsonl as an RL run does: before the first step and after the last."""
    train_sft(config)
    folder, rows = Path(config.run.dir), []
    for step, model in ((0, Path(config.model.path)), (config.sft.total_steps, folder / "hf")):
        with evaluate.serving_model(config, model):
            rows.append({"step": step, **evaluate.run(config, step)})
    write_whole(folder / EVALUATIONS, "".join(json.dumps(row) + "\n" for row in rows))


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


def _last_row(path: Path) -> dict[str, Any] | None:
    rows = read_jsonl(path) if path.is_file() else []
    return rows[-1] if rows else None
