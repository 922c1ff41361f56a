"""The stages of a pipeline as configurations, all known and checked before the first one starts.

Every stage leaves its model in <its folder>/hf, so the configuration of the next does not depend on how it went; a
selection leaves a link there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_rl.config.distillation import DistillationConfig, teachers_at
from megatron_rl.config.load import SHORTHANDS, load
from megatron_rl.config.pipeline import BASE, PipelineStage
from megatron_rl.config.resources import CONF_DIR
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.orchestrator import stages as rl_stages

__all__ = ["Plan", "Stage", "plan"]

GIVEN = ("run.dir", "run.name", "run.seed", "model.path", "select.folder")
"""Keys of a stage that follow from the pipeline."""


@dataclass(frozen=True)
class Stage:
    """One stage, composed.

    - recipe: `base`, or as PipelineStage has it. model: the checkpoint's folder afterwards.
    - after: the stage that it starts from; "" for the base. teachers: the stages whose models teach it.
    """

    name: str
    recipe: str
    title: str
    config: Config
    model: Path
    after: str = ""
    teachers: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """All stages that its result depends on directly."""
        return (*([self.after] if self.after else []), *self.teachers)

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Plan:
    """whole: the pipeline's own configuration, which evaluates; its engine serves every stage."""

    whole: Config
    stages: tuple[Stage, ...]

    @property
    def folder(self) -> Path:
        return Path(self.whole.run.dir)

    @property
    def engine_config(self) -> Config:
        """What the engine is started with: the longest context of any stage that asks it."""
        asking = [self.whole, *(each.config for each in self.stages if each.recipe in ("select", "rl"))]
        longest = max(rl_stages.widest(config).rollout.max_context_tokens for config in asking)
        rollout = dataclasses.replace(self.whole.rollout, max_context_tokens=longest)
        return dataclasses.replace(self.whole, rollout=rollout)


def plan(overrides: Sequence[str]) -> Plan:
    """`overrides`: of the pipeline, and NAME.key=value of the stage NAME. ValueError names stage and key."""
    own, of_stages = split(overrides)
    whole = load(own)
    declared = whole.pipeline.stages
    require(bool(declared), "pipeline.stages is empty: choose an experiment that has some, e.g. "
            "experiment=ring_lite_tiny")
    for name, texts in of_stages.items():
        require(name in declared, f"{name}.{texts[0]}: neither a section of the configuration nor a stage; the stages "
                f"are {', '.join(declared)}")
    for name, stage in declared.items():
        require(not _is_own(name), f"pipeline.stages.{name}: there is a section of that name; choose another")
        _check_overrides(name, (*stage.overrides, *of_stages.get(name, ())))
    require(bool(whole.model.path) or whole.pipeline.random_base,
            "model.path is not set: give the base checkpoint's folder")
    root = Path(whole.run.dir)
    base = Path(whole.model.path) if whole.model.path else root / BASE / "hf"
    models = {BASE: base} | {name: root / name / "hf" for name in declared}
    after = {name: declared[name].after or before for before, name in pairwise([BASE, *declared])}
    after |= {name: _last_sft(declared, name) for name in declared if declared[name].recipe == "select"}
    # selections last: a mistake in an rl stage that they inherit is then reported as that stage's
    configs = {name: _compose(whole, name, models[after[name]], models, of_stages)
               for name in sorted(declared, key=lambda name: declared[name].recipe == "select")}
    first = dataclasses.replace(whole, run=dataclasses.replace(whole.run, dir=str(root / BASE)),
                                model=dataclasses.replace(whole.model, path=str(base)))
    result = Plan(whole, (Stage(BASE, BASE, "the base model", first, base),
                          *(Stage(name, stage.recipe, stage.title or name, configs[name], models[name], after[name],
                                  tuple(dict.fromkeys(stage.teachers.values())))
                            for name, stage in declared.items())))
    _check(result)
    return result


def _compose(whole: Config, name: str, model: Path, models: Mapping[str, Path],
             of_stages: dict[str, list[str]]) -> Config:
    """The configuration of one stage: its own overrides, the user's, and what follows from the pipeline.

    model: where it starts. models: what each stage leaves.
    """
    declared, root = whole.pipeline.stages, Path(whole.run.dir)
    texts, taught = [*declared[name].overrides, *of_stages.get(name, ())], declared[name].teachers
    given = {"run.dir": root / name, "run.name": name, "run.seed": whole.run.seed, "model.path": model}
    if declared[name].recipe == "select":
        names = list(declared)
        rl = next(each for each in names[names.index(name):] if declared[each].recipe == "rl")
        texts, taught = [*declared[rl].overrides, *of_stages.get(rl, ()), *texts], declared[rl].teachers
        given["select.folder"] = root / _last_sft(declared, name)
    teachers = teachers_at(taught, models) if taught else []
    try:
        config = load([*texts, *(f"{key}={value}" for key, value in given.items()), *teachers])
    except ValueError as error:
        raise ValueError(f"stage {name}: {error}") from error
    if declared[name].recipe == "select":  # which asks no teacher of the rl stage that it repeats
        config = dataclasses.replace(config, algo=dataclasses.replace(config.algo, distillation=DistillationConfig()))
    engine = dataclasses.replace(config.rollout, engine=whole.rollout.engine)
    return dataclasses.replace(config, observe=whole.observe, rollout=engine)


def _last_sft(declared: Mapping[str, PipelineStage], name: str) -> str:
    """The stage of whose epochs the selection `name` takes one."""
    names = list(declared)
    return next(each for each in reversed(names[:names.index(name)]) if declared[each].recipe == "sft")


def split(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The pipeline's own overrides, and those of stages without the stage's name in front."""
    own: list[str] = []
    of_stages: dict[str, list[str]] = {}
    for text in overrides:
        name, dot, rest = text.partition("=")[0].partition(".")
        if _is_own(name) or not dot:
            own.append(text)
        else:
            of_stages.setdefault(name, []).append(text[len(name) + 1:])
    return own, of_stages


def _is_own(name: str) -> bool:
    name = name.lstrip("+~")
    return (name in {field.name for field in dataclasses.fields(Config)} or name in SHORTHANDS
            or (CONF_DIR / name).is_dir())


def _check_overrides(name: str, texts: Sequence[str]) -> None:
    for text in texts:
        key = text.partition("=")[0].lstrip("+")
        key = SHORTHANDS.get(key, key)
        require(key not in GIVEN and not key.startswith(("observe.", "rollout.engine.")),
                f"{name}.{key} follows from the pipeline: set {key} without the stage's name, for all of them"
                if key != "select.folder" else f"{name}.{key} is the folder of the sft stage before")


def _check(result: Plan) -> None:
    whole = result.whole
    for place, stage in enumerate(result.stages):
        require(stage.recipe == BASE or stage.config.run.export_hf,
                f"stage {stage.name}: run.export_hf=false leaves no model for the next stage")
        if stage.recipe == "select":
            sft = next(each for each in reversed(result.stages[:place]) if each.recipe == "sft")
            require(sft.config.sft.export_epochs, f"stage {sft.name}: {stage.name} chooses among its epochs, which "
                    "needs sft.export_epochs=true")
        if stage.recipe in ("select", "rl"):
            for key, given, needed in (
                    ("model.dtype", stage.config.model.dtype, whole.model.dtype),
                    ("algo.router_replay", stage.config.algo.router_replay, whole.algo.router_replay)):
                require(given == needed, f"stage {stage.name}: {key}={given}, but {key}={needed} of the pipeline: one "
                        "engine serves every stage, so they must be the same")
