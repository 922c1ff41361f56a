"""Section `pipeline` of the configuration: several runs, each from the model of the one before."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.rules import require

BASE = "base"
NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class PipelineStage:
    """One stage of the pipeline.

    - recipe: `sft` and `rl` train. `select` takes one epoch of the last sft stage by its entropy on the RL prompts
      (section select); it composes the overrides of the next rl stage and then its own.
    - title: the name for readers; empty: the stage's name.
    - after: the stage (or `base`) whose model it starts from; empty: the one before it, or for `select` the last sft
      stage. Several stages may start from one model.
    - teachers: domain -> the earlier stage whose model teaches its prompts (algo.distillation), for an rl stage. It
      becomes algo.distillation.teachers.<stage> and algo.distillation.routes.<domain>.
    - overrides: they compose the stage's configuration, usually an experiment's name and little else.
    """

    recipe: Literal["sft", "select", "rl"] = "rl"
    title: str = ""
    after: str = ""
    teachers: dict[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineConfig:
    """What `megatron-rl pipeline` runs. The other sections of the file set its evaluations.

    - stages: the stages by name, in their order.
    - random_base: without a model.path, start from the quick start's random model.
    - note: what the report says at the top.

    Stage NAME lives in <run.dir>/NAME and starts from the model of the stage before it, or of `after`; the first from
    model.path.
    Section eval evaluates the model of every stage. run.seed, observe and rollout.engine hold for all stages, which
    share one engine.
    """

    random_base: bool = False
    note: str = ""
    stages: dict[str, PipelineStage] = field(default_factory=dict)

    def __post_init__(self):
        trained = False
        for place, (name, stage) in enumerate(self.stages.items()):
            require(NAME.fullmatch(name) is not None and name != BASE,
                    f"pipeline.stages: {name!r} must be a word of lower-case letters, digits and _, and not {BASE}")
            require(stage.recipe != "select" or trained,
                    f"pipeline.stages.{name}.recipe=select needs an sft stage before it")
            earlier = [BASE, *list(self.stages)[:place]]
            require(not stage.after or stage.after in earlier, f"pipeline.stages.{name}.after={stage.after} is no "
                    f"earlier stage: {', '.join(earlier)}")
            require(not stage.after or stage.recipe != "select", f"pipeline.stages.{name}.after={stage.after}: "
                    "recipe=select takes an epoch of the last sft stage before it; leave `after` out")
            require(not stage.teachers or stage.recipe == "rl",
                    f"pipeline.stages.{name}.teachers are for recipe=rl, not {stage.recipe}")
            for domain, teacher in stage.teachers.items():
                require(teacher in earlier, f"pipeline.stages.{name}.teachers.{domain}={teacher} is no earlier stage: "
                        f"{', '.join(earlier)}")
            later = list(self.stages.values())[place + 1:]
            require(stage.recipe != "select" or any(each.recipe == "rl" for each in later),
                    f"pipeline.stages.{name}.recipe=select needs an rl stage after it, whose prompts it uses")
            trained = trained or stage.recipe == "sft"
