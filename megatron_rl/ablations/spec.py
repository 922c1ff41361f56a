"""What an ablation compares, read strictly from examples/<name>/ablation.yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import yaml

from megatron_rl.config.load import build
from megatron_rl.config.resources import EXAMPLES
from megatron_rl.config.rules import require

FILE = "ablation.yaml"

Take = Literal["first", "last", "gain", "mean", "end", "sum", "cv", "jitter"]
"""How the steps of a run become one number (results.take)."""


@dataclass(frozen=True)
class Arm:
    """One side of the comparison, or a run under `prepared` that others need.

    - recipe: `rl` and `sft` train. `evaluate`, only under prepared, samples responses to the problems of section eval.
    - start: the run under starts or prepared whose model it begins with; else model.path is set.
    - teachers: domain -> the run under starts or prepared that teaches its prompts (algo.distillation); for `rl`.
    - responses_of: the run under prepared, of recipe `evaluate`, whose responses it learns; for `sft`.
    - overrides: under prepared all of them, for an arm those beside Scale.common.
    """

    recipe: Literal["rl", "sft", "evaluate"] = "rl"
    start: str | None = None
    teachers: dict[str, str] = field(default_factory=dict)
    responses_of: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def needs(self) -> set[str]:
        """The runs that come before it."""
        return {self.start, self.responses_of, *self.teachers.values()} - {None}


@dataclass(frozen=True)
class Scale:
    """The runs at one size.

    - common: overrides of every arm.
    - starts: supervised runs from a random model, by name.
    - prepared: more runs that come before the arms, once for all seeds, by name. One may need those above it.
    """

    seeds: tuple[int, ...] = (0,)
    common: tuple[str, ...] = ()
    starts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prepared: dict[str, Arm] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)

    def __post_init__(self):
        require(len(self.arms) > 0, "scales: a scale without arms")
        recipes: dict[str, str] = dict.fromkeys(self.starts, "sft")
        for name, run in self.prepared.items():
            require(name not in recipes, f"scales: {name} is under starts and under prepared: rename one")
            _check(run, f"prepared run {name}", recipes)
            recipes[name] = run.recipe
        for name, arm in self.arms.items():
            require(arm.recipe != "evaluate", f"scales: arm {name} has recipe: evaluate, which is for prepared runs")
            _check(arm, f"arm {name}", recipes)


def _check(run: Arm, what: str, recipes: Mapping[str, str]) -> None:
    """ValueError unless `run` needs only runs that come before it. recipes: those, each with its recipe."""
    require(not run.teachers or run.recipe == "rl", f"scales: {what} has teachers, which are for recipe: rl")
    require(run.responses_of is None or run.recipe == "sft",
            f"scales: {what} has responses_of, which is for recipe: sft")
    for key, names in {"start": [run.start], "teachers": run.teachers.values(),
                       "responses_of": [run.responses_of]}.items():
        for name in names:
            if name is None:
                continue
            require(name in recipes,
                    f"scales: {what} has {key}: {name}, which is not under starts nor under prepared above it")
            evaluates = recipes[name] == "evaluate"
            require(evaluates == (key == "responses_of"), f"scales: {what} has {key}: {name}, which "
                    f"{'leaves responses and no model' if evaluates else 'leaves a model and no responses'}")


@dataclass(frozen=True)
class Column:
    """A column of the result's table, and what statements compare. metric: of metrics.jsonl, or held_out/<name>."""

    label: str = ""
    metric: str = ""
    take: Take = "mean"
    digits: int = 3


@dataclass(frozen=True)
class Panel:
    """A part of the figure: `metric` over steps, or with `column` that column's number at each arm.

    paper: the paper's number at each arm, drawn on an axis of its own, which `paper_unit` names.
    """

    title: str = ""
    unit: str = ""
    metric: str | None = None
    column: str | None = None
    paper: dict[str, float] = field(default_factory=dict)
    paper_unit: str = "paper"

    def __post_init__(self):
        require((self.metric is None) != (self.column is None), f"panels: {self.title!r} needs metric or column")


@dataclass(frozen=True)
class Statement:
    """A claim that the data may support or contradict: in `column`, `arm` is `direction` than `than`, or than 0."""

    text: str = ""
    column: str = ""
    arm: str = ""
    direction: Literal["higher", "lower"] = "higher"
    than: str | None = None


@dataclass(frozen=True)
class PaperTable:
    """The paper's own numbers as it prints them, set beside ours."""

    caption: str = ""
    columns: tuple[str, ...] = ()
    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    """One ablation. arms: name -> what it is called. same_runs_as: another ablation whose runs are looked at anew."""

    title: str = ""
    arms: dict[str, str] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    same_runs_as: str | None = None
    columns: tuple[Column, ...] = ()
    panels: tuple[Panel, ...] = ()
    statements: tuple[Statement, ...] = ()
    paper: PaperTable | None = None

    def __post_init__(self):
        labels = {column.label for column in self.columns}
        for scale in self.scales.values():
            require(scale.arms.keys() <= self.arms.keys(),
                    f"scales: no label under arms for {', '.join(sorted(scale.arms.keys() - self.arms.keys()))}")
        for each in (*self.statements, *(panel for panel in self.panels if panel.column)):
            require(each.column in labels, f"column {each.column!r} is not under columns")
        for statement in self.statements:
            for arm in (statement.arm, statement.than):
                require(not self.arms or arm is None or arm in self.arms, f"statements: {arm!r} is not under arms")


def names() -> list[str]:
    """The ablations there are."""
    return sorted(path.parent.name for path in EXAMPLES.glob(f"*/{FILE}"))


def load_ablation(name: str) -> Ablation:
    """ValueError names the file and the key that is unknown or wrong."""
    path = EXAMPLES / name / FILE
    if not path.is_file():
        raise ValueError(f"no ablation {name!r}; there are {', '.join(names())}")
    try:
        ablation = build(yaml.safe_load(path.read_text(encoding="utf-8")), Ablation)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if ablation.same_runs_as is None:
        return ablation
    runs = load_ablation(ablation.same_runs_as)
    return dataclasses.replace(ablation, arms=runs.arms, scales=runs.scales)
