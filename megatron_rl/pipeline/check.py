"""All of a pipeline's stages validated before the first one starts, since each may take days."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.table import Table

from megatron_rl.config.check import check_evaluates, check_rl, check_served_alone, check_sft
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config
from megatron_rl.model.architectures import parse_config
from megatron_rl.model.fresh import bailing_config
from megatron_rl.model.network import Network, check_layout
from megatron_rl.model.tokenizer import load_tokenizer
from megatron_rl.orchestrator import stages as rl_stages
from megatron_rl.pipeline.plan import Plan, Stage
from megatron_rl.preflight import (
    check_backends,
    check_data,
    check_folders,
    check_functions,
    check_memory,
    check_reference,
    network_of,
    sizes_of,
)
from megatron_rl.prompts import sft_source

__all__ = ["branches", "check", "check_memories", "check_start", "table"]


def check(plan: Plan) -> None:
    """Every rule that needs neither rank nor data. ValueError names stage and key."""
    check_evaluates(plan.whole, "a pipeline")
    network = base_network(plan)
    for stage in sorted(plan.stages, key=lambda stage: stage.recipe == "select"):  # which repeats an rl stage
        try:
            _check_stage(stage, network)
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from error


def check_start(plan: Plan, places: Sequence[int]) -> None:
    """`check`, the base checkpoint, and the data of the stages at `places`, read with the base's tokenizer."""
    check(plan)
    base, made_here = plan.stages[0].model, {stage.model.resolve() for stage in plan.stages}
    check_folders(at(plan.whole, base), exports=True)
    check_data(at(plan.whole, base))
    for stage in (plan.stages[place] for place in places if place):
        config = at(stage.config, base, stage.teachers)
        try:
            if stage.recipe == "sft":
                sft_source(config, load_tokenizer(config.model))
            else:
                check_data(config)
                if Path(config.model.reference_path or base).resolve() not in made_here:
                    check_reference(config)
        except (ValueError, OSError) as error:
            raise ValueError(f"stage {stage.name}: {error}") from error


def check_memories(plan: Plan, places: Sequence[int]) -> None:
    """ValueError for the first rl stage at `places` whose ranks, teachers included, do not fit into this machine."""
    for stage in (plan.stages[place] for place in places):
        try:
            if stage.recipe == "rl":
                check_memory(at(stage.config, plan.stages[0].model, stage.teachers))
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from error


def base_network(plan: Plan) -> Network:
    """Every stage's: training changes no size. ValueError when the base model is neither here nor described."""
    base = plan.stages[0].model
    if plan.whole.pipeline.random_base and not plan.whole.model.path and not (base / "config.json").is_file():
        return parse_config(bailing_config(), "the quick start's model")
    return network_of(at(plan.whole, base))


def at(config: Config, folder: Path, teachers: Sequence[str] = ()) -> Config:
    """The configuration with the model of `folder`, and its `teachers`, which may not be there yet, with it too."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))
    if not teachers:
        return config
    given = config.algo.distillation.teachers
    there = {name: dataclasses.replace(given[name], checkpoint=str(folder)) for name in teachers}
    teaching = dataclasses.replace(config.algo.distillation, teachers={**given, **there})
    return dataclasses.replace(config, algo=dataclasses.replace(config.algo, distillation=teaching))


def _check_stage(stage: Stage, network: Network) -> None:
    config, sizes = stage.config, sizes_of(network)
    require(config.rollout.publish != "adapter", "rollout.publish=adapter: one engine serves every stage, each with "
            "weights of its own, and adapters stand beside one model's; use tensor, broadcast or disk")
    if stage.recipe in ("base", "select"):
        check_served_alone(config)
    if stage.recipe in ("base", "rl"):
        check_functions(config)
    if stage.recipe == "base":
        return
    check_layout(network, config.parallel)
    check_backends(config, network)
    if stage.recipe == "sft":
        check_sft(config, sizes)
        return
    for each in rl_stages.stage_configs(config):
        check_rl(each, sizes)
    if stage.recipe == "select":
        require(config.rollout.temperature == 1.0,
                f"rollout.temperature={config.rollout.temperature}: the entropy is that of the policy at 1.0")


def table(plan: Plan) -> Table:
    """A line for each stage: what it resolves to."""
    shown = Table("stage", "recipe", "ranks", "steps", "Phi", "context", "learning rate",
                  title=f"{plan.whole.run.name}: {plan.folder}")
    for stage in plan.stages:
        config = stage.config
        cells = ["-"] * 5
        if stage.recipe in ("sft", "rl"):
            rl = stage.recipe == "rl"
            budget = rl and config.algo.has_budget
            cells = [str(config.parallel.world_size), f"{config.run.steps if rl else config.sft.total_steps:,}",
                     f"{config.algo.phi_global(config.parallel.dp):,}" if budget else "-",
                     f"{rl_stages.widest(config).rollout.max_context_tokens:,}", f"{config.optimizer.lr:g}"]
        elif stage.recipe == "select":
            cells[3] = f"{config.rollout.max_context_tokens:,}"
        shown.add_row(stage.name, stage.recipe, *cells)
    return shown


def branches(plan: Plan) -> list[str]:
    """A line for each stage that does not simply follow the one before it."""
    lines = []
    for before, stage in pairwise(plan.stages):
        taught = f", taught by {', '.join(stage.teachers)}" if stage.teachers else ""
        if taught or stage.after != before.name:
            lines.append(f"{stage.name} starts from the model of {stage.after}{taught}")
    return lines
