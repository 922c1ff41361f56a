"""A step that is not finite changes nothing, is dumped, replays to the same finding, and ends the run when it stays."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tests.distributed.long_run_worker as worker
from megatron_rl.config.load import load, to_dict
from megatron_rl.launch.local import rank_environment, ranks_command
from tests.tiny_models import write_tiny_bailing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {"ep2": ["parallel=ep2"], "tp2_plain": ["parallel=tp2", "parallel.distributed_optimizer=false"],
           "pp2_bf16": ["parallel=pp2", "model.dtype=bfloat16"],
           "recompute": ["parallel=single", "model.recompute=full"]}
HEALTHY_STEP = 2


def start(run_dir: Path, model: Path, *overrides: str) -> subprocess.CompletedProcess:
    config = load([f"run.dir={run_dir}", f"model.path={model}", "algo.phi=90", "algo.loss.kl_coef=0.01",
                   "batch.tokens_per_microbatch=40", "rollout.max_response_tokens=20", "rollout.max_context_tokens=32",
                   "optimizer.lr=1e-3", *overrides])
    run_dir.mkdir(parents=True)
    path = run_dir / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    return subprocess.run(
        [*ranks_command(config), "tests.distributed.long_run_worker", str(path)], cwd=ROOT, env=rank_environment(),
        capture_output=True, text=True, timeout=600)


def replay(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "megatron_rl.cli", "replay-step", str(folder)], cwd=ROOT,
                          env=rank_environment(), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_bailing(tmp_path_factory.mktemp("long_run") / "model", vocab_size=worker.VOCABULARY)


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """layout -> (run folder, what the worker reports) of a whole run, made when it is first asked for."""

    @functools.cache
    def made(layout: str) -> tuple[Path, dict]:
        run_dir = tmp_path_factory.mktemp(layout) / "run"
        done = start(run_dir, model, *LAYOUTS[layout], f"run.dump_steps=[{HEALTHY_STEP}]", "run.keep_dumps=3")
        assert done.returncode == 0, done.stderr[-3000:]
        return run_dir, torch.load(run_dir / "steps.pt")

    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spoilt_step_leaves_weights_and_moments_alone_on_every_rank(runs, layout):
    _, report = runs(layout)
    spoilt = [step in (worker.SPOILT_STEP, worker.BROKEN_STEP) for step in range(1, worker.STEPS + 1)]
    assert report["skipped"] == spoilt
    for skipped, before, after, moved in zip(spoilt, report["weights"][:-1], report["weights"][1:],
                                             report["moments_changed"], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before) == skipped
        assert moved == [not skipped] * len(moved)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in report["weights"][-1].values())


def test_an_update_on_policy_needs_no_pass_before_it(model, tmp_path):
    """Without a balance loss the old log-probabilities are the update's own; recorded routes force the pass."""
    reports = []
    for name, replay in (("without", "none"), ("with", "trainer")):
        done = start(tmp_path / name, model, "algo.balance_coef=0", "algo.mismatch=tis", f"algo.router_replay={replay}")
        assert done.returncode == 0, done.stderr[-3000:]
        reports.append(torch.load(tmp_path / name / "steps.pt")["weights"][-1])
    without, with_ = reports
    assert all(torch.equal(without[name], with_[name]) for name in with_)


def replayed(run_dir: Path, step: int) -> list[str]:
    """What the command says after the two compared values, which must be the run's, bit for bit."""
    done = replay(run_dir / "dumps" / f"step_{step:08d}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 2
    return done.stdout.splitlines()[3:]


@pytest.mark.parametrize("layout", ["ep2", "pp2_bf16"])
def test_a_healthy_step_replays_to_the_same_bits(runs, layout):
    assert replayed(runs(layout)[0], HEALTHY_STEP) == ["every value is finite"]


def test_an_infinite_advantage_is_found_in_its_sample(runs):
    run_dir, _ = runs("tp2_plain")
    _, first, *others = replayed(run_dir, worker.SPOILT_STEP)
    config = load(["algo.phi=90", "parallel=tp2"])
    sample = worker.step_batch(config, worker.SPOILT_STEP).samples[worker.SPOILT_PLACE].index
    assert first.startswith("input: advantages, micro-batch ") and first.endswith(f", sample {sample}")
    assert others[-1].startswith("gradient: ")


def test_under_recompute_the_backward_pass_is_watched_too(runs):
    """The infinite advantage shows first in the gradient of the last layer's output, not only at the embedding."""
    findings = replayed(runs("recompute")[0], worker.SPOILT_STEP)
    backward, = (finding for finding in findings if finding.startswith("backward: "))
    assert backward.startswith("backward: gradient of the output of layer 2, micro-batch ")


def test_a_broken_weight_is_found_and_where_it_first_shows(runs):
    run_dir, _ = runs("ep2")
    _, first, _, third, *_ = replayed(run_dir, worker.BROKEN_STEP)
    assert first == "weight: model.layers.1.post_attention_layernorm.weight"
    assert third.startswith("forward: output of layer 2 mlp, micro-batch 0 of rank 0, sample ")
    assert [path.name for path in sorted((run_dir / "dumps").iterdir())] == [
        f"step_{step:08d}" for step in (HEALTHY_STEP, worker.SPOILT_STEP, worker.BROKEN_STEP)]


def test_too_many_in_a_row_end_the_run_with_a_message(model, tmp_path):
    stopped = start(tmp_path / "run", model, "parallel=single", "run.max_skipped_in_a_row=0")
    assert stopped.returncode != 0
    assert ("1 optimiser steps in a row, up to step 3, had a loss or a gradient that is NaN or infinite "
            "(run.max_skipped_in_a_row=0)") in stopped.stderr
    assert f"replay-step {tmp_path}/run/dumps/step_00000003" in stopped.stderr


def test_a_folder_that_is_no_dump_is_named(tmp_path):
    failed = replay(tmp_path)
    assert failed.returncode == 2 and "is not the dump of a step" in failed.stderr
