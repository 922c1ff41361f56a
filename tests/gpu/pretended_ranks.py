"""The ranks that run on the pretended GPU (pretended_worker.py starts them).

They are forked after the imports. Every rank runs both recipes in each layout, and again with the faults of PLANTS that
belong there, and writes what was found as FOLDER/LAYOUT.RECIPE[.planted].RANK.json. A rank that is alone writes what
becomes of RULES as FOLDER/rules.json.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from c3po import BudgetSelection
from megatron_rl import topology
from megatron_rl.batch import StepBatch
from megatron_rl.config.load import build, load, to_dict
from megatron_rl.config.orchestrator import RUN_KEY
from megatron_rl.config.schema import Config
from megatron_rl.handoff import cut_into_shards, write_shard
from megatron_rl.model.architectures import read_config
from megatron_rl.model.network import Network
from megatron_rl.recipes import sft
from megatron_rl.rollout.ports import choose_port
from megatron_rl.trainer import sender
from megatron_rl.trainer.client import Link
from megatron_rl.trainer.main import Trainer
from megatron_rl.types import TrainSample
from tests.distributed import gpu_operators, varlen  # noqa: F401  -- a CPU's kernels for what a GPU alone has
from tests.gpu import pretended
from tests.gpu.pretended_cases import LAYOUTS, PLANTS, ROOT, RULES, Plant, model_of, world_size

SFT = ["experiment=quickstart_sft", "sft.examples=4", "sft.batch_size=4", "sft.epochs=1", "sft.schedule_epochs=1",
       "sft.balance_coef=0.01"]
RL = ["experiment=quickstart", "algo.phi=120", "run.steps=1", "orchestrator.port=1",
      "rollout.engine.urls=[http://127.0.0.1:1]"]
COMMON = ["parallel=single", "model.dtype=bfloat16", "batch.tokens_per_microbatch=128", "optimizer.warmup_steps=1",
          "observe.progress=false"]


class Engine:
    """Takes everything. A broadcast's group has none of its ranks, so it ends with rank 0 alone."""

    base_url, control_timeout_s = "http://127.0.0.1:1", 5.0

    def __init__(self, config: Config):
        self._tp_size = 0 if config.rollout.publish == "broadcast" else 1

    async def server_info(self) -> dict[str, Any]:
        return {"tp_size": self._tp_size}

    def __getattr__(self, name: str):
        async def take(*args, **kwargs) -> None:
            pass

        return take


class Orchestrator:
    """Answers a rank that asks for its shard of a step or for the state to save."""

    def __init__(self, config: Config):
        self._config, self._network = config, read_config(config.model.path)

    def request(self, method: str, path: str) -> bytes:
        match path.split("/")[1:]:
            case ["step", step, "shard", dp_rank]:
                batches = [responses(self._config, self._network, seed=int(step) + update)
                           for update in range(self._config.algo.updates_per_rollout)]
                shards = cut_into_shards(batches, self._config, dataclasses.asdict(self._network))
                return write_shard(shards[int(dp_rank)])
            case ["state", _]:
                return b"state"
        raise AssertionError(f"{method} {path}")


def responses(config: Config, network: Network, *, seed: int) -> StepBatch:
    """Six random responses, with the experts that they took if these are replayed."""
    rng, samples = np.random.default_rng(seed), []
    for index in range(6):
        length = int(rng.integers(20, 40))
        mask = np.arange(length) >= 8
        experts = rng.random((length - 1, network.num_moe_layers, network.num_experts)).argsort(-1)
        samples.append(TrainSample(
            index, rng.integers(network.vocab_size, size=length).astype(np.int32), mask,
            np.where(mask, -4.0, 0.0).astype(np.float32), float(rng.normal()), int(mask.sum()),
            experts[..., :network.num_experts_per_tok].astype(np.uint8) if config.algo.router_replay == "rollout"
            else None))
    tokens = [sample.num_response_tokens for sample in samples]
    return StepBatch(tuple(samples), BudgetSelection(torch.tensor(tokens), sum(tokens), config.algo.phi), len(tokens),
                     sum(tokens))


def run_rl(config: Config) -> None:
    """A trainer learns a step, saves and publishes; another one reads its checkpoint and, in some layouts, goes on."""
    here = topology.start(config.parallel, seed=config.run.seed)

    def trainer(checkpoint: str | None) -> Trainer:
        link = Link(config.orchestrator, here)
        link._client = Orchestrator(config)
        made = Trainer(here, link, SimpleNamespace(doing=""))
        made.execute({"kind": "start", "config": to_dict(config), "checkpoint": checkpoint, "stage": None,
                      "schedule_updates": 4, "reset_optimizer": False})
        return made

    first = trainer(None)
    first.execute({"kind": "train", "step": 0})
    first.execute({"kind": "save", "step": 1, "loop_state": {}})
    outcome = first.execute({"kind": "publish", "version": 1, "urls": [Engine.base_url],
                             "layouts": [("cpu", 1), ("cuda", 2)]})
    assert not here.is_main or (outcome["bytes"] and not outcome["failures"]), outcome
    first.execute({"kind": "finish", "export_hf": True})
    second = trainer(f"{config.run.dir}/checkpoints/step_00000001")
    assert second.steps_done == 1
    if config.run.steps > 1:
        second.execute({"kind": "train", "step": 1})
    topology.stop()


RECIPES = {"sft": (sft.run, SFT), "rl": (run_rl, RL)}


@dataclasses.dataclass(frozen=True)
class Run:
    """port: where its ranks meet."""

    layout: str
    recipe: str
    plants: Sequence[Plant]
    port: int

    @property
    def name(self) -> str:
        return f"{self.layout}.{self.recipe}{'.planted' if self.plants else ''}"


def configured(base: dict[str, Any], layout: str, folder: Path, name: str) -> Config:
    """`base` in this layout. Not by load(), which would take longer than the run."""
    keys = {**LAYOUTS[layout], "parallel.world_size": world_size(layout), "run.dir": str(folder / name),
            "model.path": str(folder / model_of(layout))}
    values = copy.deepcopy(base)
    for key, value in keys.items():
        *sections, last = key.split(".")
        section = functools.reduce(dict.__getitem__, sections, values)
        assert last in section, key
        section[last] = value
    return build(values)


def run_layout(run: Run, config: Config) -> dict[str, Any]:
    """What was found while the recipe ran, with the run's faults planted."""
    Path(config.run.dir).mkdir(exist_ok=True)
    sender.engine_clients = lambda config: [Engine(config)]
    with contextlib.ExitStack() as faults:
        for plant in run.plants:
            faults.enter_context(planted(plant))
        with pretended.Watch() as watch:
            RECIPES[run.recipe][0](config)
    return {"findings": [dataclasses.asdict(finding) | {"times": times} for finding, times in pretended.found.items()],
            "operations": watch.operations, "collectives": watch.collectives}


def judge_rules() -> dict[str, list[str]]:
    """Rule -> the kinds that were found."""
    kinds = {}
    for name, (operation, _) in RULES.items():
        with pretended.Watch():
            operation(torch.ones(2, 2, device="cuda"), torch.ones(2, 2))
        kinds[name] = [finding.kind for finding in pretended.found]
    return kinds


@contextlib.contextmanager
def planted(plant: Plant) -> Iterator[None]:
    """Inside, the function runs its own source with the plant's line; lines keep their numbers."""
    function: Any = importlib.import_module(
        plant.file.removeprefix("kernels/").removesuffix(".py").replace("/", "."))
    for name in plant.function.split("."):
        function = vars(function)[name]
    function = getattr(function, "__wrapped__", function)
    path, before = ROOT / plant.file, function.__code__
    text = path.read_text()
    assert text.count(plant.old) == 1, f"{plant.file} has {plant.old!r} {text.count(plant.old)} times"
    function.__code__ = next(
        code for code in pretended.code_within(compile(text.replace(plant.old, plant.new), str(path), "exec"))
        if code.co_qualname == plant.function)
    if plant.kind == pretended.LEAK:
        function()  # else it runs when megatron_rl is imported
    try:
        yield
    finally:
        function.__code__ = before


def run_rank(rank: int, folder: Path, size: int, bases: dict[str, dict[str, Any]], runs: Sequence[Run]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      **{RUN_KEY: "a key"})
    if size == 1:
        (folder / "rules.json").write_text(json.dumps(judge_rules()))
    for run in runs:
        os.environ["MASTER_PORT"] = str(run.port)
        found = run_layout(run, configured(bases[run.recipe], run.layout, folder, run.name))
        (folder / f"{run.name}.{rank}.json").write_text(json.dumps(found))


def main(folder: str, size: str, *layouts: str) -> None:
    bases = {recipe: to_dict(load([*overrides, *COMMON])) for recipe, (_, overrides) in RECIPES.items()}
    gc.freeze()  # what was imported is not looked through again in every rank
    for layout in layouts:  # in ranks of its own: threads of groups that are left over poll on
        runs = [Run(layout, recipe, (), choose_port(None)) for recipe in RECIPES]
        for recipe in RECIPES:  # last: a planted adaptation stays
            if plants := [plant for plant in PLANTS.values() if (plant.layout, plant.recipe) == (layout, recipe)]:
                runs.append(Run(layout, recipe, plants, choose_port(None)))
        torch.multiprocessing.start_processes(run_rank, args=(Path(folder), int(size), bases, runs), nprocs=int(size),
                                              start_method="fork")
