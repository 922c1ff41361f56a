"""An RL run in training stages: which stage a checkpoint is in, what it changes, and when it is over.

At the start of a stage the ranks start again, from the last checkpoint. Its loop.json says which stage saved it, where
that stage began and whether it was over. So a run that was stopped anywhere goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config.load import build, to_dict
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.config.stage import StageConfig
from megatron_rl.model import checkpoint_files as files

__all__ = ["Stage", "current", "plateaued", "resumed", "stage_at", "stage_configs", "widest"]


@dataclass(frozen=True)
class Stage:
    """Where a run is.

    - whole: the configuration as it was given. config: what holds in this stage; run.steps is its last step.
    - options: the stage's own section; None in a run without stages.
    - fresh: nothing of this stage has been saved yet.
    - done: this is the last stage, and it is over.
    """

    whole: Config
    config: Config
    index: int = 0
    first_step: int = 0
    fresh: bool = False
    done: bool = False
    options: StageConfig | None = None

    @property
    def is_last(self) -> bool:
        return self.index >= len(self.whole.stages) - 1

    @property
    def resets_optimizer(self) -> bool:
        return self.fresh and self.options is not None and self.options.optimizer == "reset"

    @property
    def keeps_order(self) -> bool:
        """Whether the order of prompts in the last checkpoint goes on."""
        before = self._before
        return before is None or _order(before) == _order(self.config)

    @property
    def keeps_open(self) -> bool:
        """Whether responses under way (rollout.collector=partial) go on: as many to a prompt, the same teachers, and no
        lower limit."""
        before, now = self._before, self.config
        return before is None or (
            (before.rollout.responses_per_prompt, before.algo.distillation)
            == (now.rollout.responses_per_prompt, now.algo.distillation)
            and before.rollout.max_response_tokens <= now.rollout.max_response_tokens)

    @property
    def _before(self) -> Config | None:
        """What held in the stage before, if the last checkpoint is of that one."""
        return stage_config(self.whole, self.index - 1, 0) if self.fresh and self.index > 0 else None

    def carried(self, state: dict[str, Any]) -> dict[str, Any]:
        """What goes on of a collector's state."""
        return state if self.keeps_open or "open" not in state else {**state, "open": []}

    @property
    def schedule_updates(self) -> int:
        """Optimiser steps that the learning-rate schedule spans: of all stages that share it, if none ends early."""
        stages = self.whole.stages
        if not stages:
            return self.config.run.steps * self.config.algo.updates_per_rollout
        anew = [index for index, stage in enumerate(stages) if stage.optimizer == "reset"]
        first = max((index for index in anew if index <= self.index), default=0)
        end = min((index for index in anew if index > self.index), default=len(stages))
        return sum(stage.steps * config.algo.updates_per_rollout
                   for stage, config in list(zip(stages, stage_configs(self.whole), strict=True))[first:end])

    @property
    def number(self) -> int | None:
        """The index, None in a run without stages."""
        return None if self.options is None else self.index

    def ending_at(self, step: int) -> Stage:
        return replace(self, config=replace(self.config, run=replace(self.config.run, steps=step)))

    def state(self, *, over: bool) -> dict:
        """What a checkpoint of this stage records about it; {} without stages."""
        if self.options is None:
            return {}
        return {"stage": {"name": self.options.name, "index": self.index, "first_step": self.first_step, "over": over}}


def current(config: Config) -> Stage:
    """The next stage, according to the checkpoint that run.resume chooses; the last stage, done, if all are over.

    ValueError if the checkpoint belongs to a run with other stages, or a stage's keys are wrong.
    """
    if not config.stages:
        return Stage(config, config)
    checkpoint = files.choose(config.run)
    if checkpoint is None:
        return stage_at(config, 0, 0, fresh=True)
    state = files.read_loop_state(checkpoint)
    place = state.get("stage", {"name": None, "index": 0})
    names = [stage.name for stage in config.stages]
    if place["index"] >= len(names) or names[place["index"]] != place["name"]:
        raise ValueError(f"{checkpoint} was saved in stage {place['index']} ({place['name'] or 'of a run without'}), "
                         f"but stages are {', '.join(names)}: they must stay the same up to there")
    following = place["index"] + 1
    if place["over"] and following < len(names):
        return stage_at(config, following, state["step"], fresh=True)
    stage = stage_at(config, place["index"], place["first_step"], fresh=False)
    if not place["over"]:
        return stage
    return replace(stage.ending_at(state["step"]), done=True)


def stage_at(config: Config, index: int, first_step: int, *, fresh: bool) -> Stage:
    """Stage `index` of a run, if it began after `first_step` steps; the run itself if it has no stages."""
    if not config.stages:
        return Stage(config, config)
    return Stage(config, stage_config(config, index, first_step), index, first_step, fresh,
                 options=config.stages[index])


def stage_config(config: Config, index: int, first_step: int) -> Config:
    """The configuration of stage `index` if it begins after `first_step` steps. ValueError names stage and key."""
    stage, raw = config.stages[index], to_dict(config)
    raw["stages"], raw["run"]["steps"] = [], first_step + stage.steps
    try:
        for dotted, value in stage.set.items():
            *sections, key = dotted.split(".")
            place = raw
            for section in sections:
                place = place.get(section)
                if not isinstance(place, dict):
                    raise ValueError(f"{dotted}: {section} is no section")
            place[key] = value
        built = build(raw)
        for key, before, now in (("algo.router_replay=rollout", config.algo.router_replay, built.algo.router_replay),
                                 ("rollout.publish=adapter", config.rollout.publish, built.rollout.publish)):
            require(now == before or now != key.partition("=")[2], f"{key} needs engines that were started for it, and "
                    "they are started once for all stages: set it outside of the stages")
        return built
    except ValueError as error:
        raise ValueError(f"stages: {stage.name}: {error}") from error


def stage_configs(config: Config) -> list[Config]:
    """The configuration of every stage in order, if none ends early. A run without stages has its own alone."""
    first, configs = 0, []
    for index, stage in enumerate(config.stages):
        configs.append(stage_config(config, index, first))
        first += stage.steps
    return configs or [config]


def widest(config: Config) -> Config:
    """`config` with the longest context of any stage. The engines start with it, because they serve all stages."""
    longest = max((each.rollout for each in stage_configs(config)), key=lambda rollout: rollout.max_context_tokens)
    return replace(config, rollout=replace(config.rollout, max_context_tokens=longest.max_context_tokens))


def resumed(config: Config) -> Config:
    """`config`, changed so that the run starts again from its newest checkpoint."""
    return replace(config, run=replace(config.run, resume=True, resume_from=None))


def plateaued(rewards: Sequence[float], steps: int, gain: float) -> bool:
    """Whether the last `steps` mean rewards are on average less than `gain` above the `steps` before them."""
    if steps == 0 or len(rewards) < 2 * steps:
        return False
    last, before = sum(rewards[-steps:]) / steps, sum(rewards[-2 * steps:-steps]) / steps
    return last - before < gain


def _order(config: Config) -> tuple[object, ...]:
    """What an order of prompts belongs to. If bad rows are left out, the room for a prompt and the scorers decide which
    are there."""
    data, rollout, reward = config.data, config.rollout, config.reward
    skips = any(part.on_error == "skip" for part in (data, *data.mix.values()))
    room = rollout.max_context_tokens - rollout.max_response_tokens
    return (replace(data, weights={}, curriculum=()), rollout.collector, rollout.pass_rate.enabled,
            (room, reward.routes, reward.shaping) if skips else None)
