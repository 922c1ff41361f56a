"""A run of RL on one GPU, which ranks and engine take in turns: one step, then another from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.model.checkpoint_files import saved_steps
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.recipes.quickstart import FLASH_HEAD_DIM, make_random_model
from tests.card.place import at, check_engine_packages
from tests.engine.test_runs import SMALL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(place, tmp_path_factory) -> Callable[[int], Path]:
    """train(steps): starts the run, or goes on with it, until it has so many steps; returns its folder."""
    check_engine_packages(place)
    folder = tmp_path_factory.mktemp("run")
    make_random_model(folder / "init", seed=0, num_hidden_layers=2, head_dim=FLASH_HEAD_DIM)

    def run(steps: int) -> Path:
        place.run("megatron_rl.cli", "rl", *SMALL, f"model.path={folder / 'init'}", f"run.dir={folder / 'rl'}",
                  f"run.steps={steps}", "run.resume=auto", "run.save_every_steps=1", "eval.problems=0",
                  "parallel=single", "model.dtype=bfloat16", f"rollout.engine.device={place.device}",
                  "rollout.engine.colocate=true", "rollout.engine.mem_fraction_static=0.3",
                  "rollout.engine.deterministic=false")
        return folder / "rl"

    return run


@pytest.fixture(scope="module")
def one_step(train) -> tuple[Path, str]:
    """The run's folder after a step, and its metrics."""
    folder = train(1)
    return folder, (folder / "metrics.jsonl").read_text()


@at("cpu")
def test_a_step_trains_publishes_and_is_saved(place, one_step):
    folder, _ = one_step
    (row,) = read_jsonl(folder / "metrics.jsonl")
    assert row["budget/selected_tokens"] > 0 and row["train/grad_norm"] > 0
    assert saved_steps(folder / "checkpoints") == [1]


@at("cpu")
def test_the_run_goes_on_from_its_checkpoint(place, one_step, train):
    folder, before = one_step
    train(2)
    assert (folder / "metrics.jsonl").read_text().startswith(before)
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2]
