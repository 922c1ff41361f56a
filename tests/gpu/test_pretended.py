"""SFT and the trainer of an RL run, layout by layout, on a pretended GPU (pretended.py): a real one refuses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.recipes.quickstart import make_random_model
from tests.distributed.conftest import run_worker
from tests.gpu.pretended import KINDS
from tests.gpu.pretended_cases import LAYOUTS, PLANTS, RECIPES, RULES, world_size

pytestmark = pytest.mark.slow

LEAST_OPERATIONS = 500
"""On CUDA tensors, on each rank. A step of the tiny model has more; with fewer, torch did not believe in the device."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the worker wrote, one start of it for each number of ranks."""
    folder = tmp_path_factory.mktemp("pretended")
    for name, layers in (("two_layers", 2), ("four_layers", 4)):
        make_random_model(folder / name, seed=0, num_hidden_layers=layers, first_k_dense_replace=1, num_experts=4,
                          hidden_size=32, intermediate_size=48, moe_intermediate_size=16, norm_head=True)
    for size in (1, 2):
        run_worker(("tests.gpu.pretended_worker",), folder, size,
                   [layout for layout in LAYOUTS if world_size(layout) == size])
    return folder


def ranks(folder: Path, run: str, layout: str) -> Iterator[dict]:
    for rank in range(world_size(layout)):
        yield json.loads((folder / f"{run}.{rank}.json").read_text())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_would_refuse_nothing(layout, recipe, folder):
    for rank in ranks(folder, f"{layout}.{recipe}", layout):
        assert rank["findings"] == []
        assert rank["operations"] > LEAST_OPERATIONS and rank["collectives"] > 0


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found_with_file_and_line(name, folder):
    plant = PLANTS[name]
    for rank in ranks(folder, f"{plant.layout}.{plant.recipe}.planted", plant.layout):
        lines = [finding["lines"] for finding in rank["findings"] if finding["kind"] == plant.kind]
        assert any(line.startswith(plant.place) for innermost in lines for line in innermost[:2]), lines


def test_every_kind_of_fault_is_planted():
    assert {plant.kind for plant in PLANTS.values()} == set(KINDS)


@pytest.mark.parametrize("name", RULES)
def test_the_judge_rules_as_cuda_does(name, folder):
    _, kind = RULES[name]
    assert json.loads((folder / "rules.json").read_text())[name] == ([] if kind is None else [kind])


def test_the_layouts_cover_what_the_configuration_offers():
    settings = [setting for keys in LAYOUTS.values() for setting in keys.items()]
    wanted = [
        *((f"parallel.{size}", 2) for size in ("tp", "pp", "vpp", "ep", "etp", "cp")),
        ("parallel.token_dispatcher", "allgather"), ("parallel.overlap", True),
        ("parallel.distributed_optimizer", False), ("model.recompute", "full"),
        ("model.recompute", "selective"), ("optimizer.offload", True), ("model.kernels.experts", "grouped_mm"),
        ("model.backend", "megatron"), *(("algo.router_replay", source) for source in ("rollout", "trainer")),
        *(("rollout.publish", transport) for transport in ("broadcast", "disk"))]
    assert [each for each in wanted if each not in settings] == []
    in_bfloat16 = [keys for keys in LAYOUTS.values() if "model.dtype" not in keys]
    for key in ("model.backend", "rollout.publish"):  # their defaults
        assert any(key not in keys for keys in in_bfloat16)
