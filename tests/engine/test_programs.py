"""The two programs of a run, one rank each, around an engine that computes nothing: what happens when one fails."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Config
from megatron_rl.launch.local import RunFailed
from megatron_rl.launch.programs import run_rl
from megatron_rl.loop import End
from megatron_rl.model.checkpoint_files import saved_steps
from megatron_rl.observe.jsonl import read_jsonl
from tests.engine.kills import (
    ORCHESTRATOR_PHASES,
    SETTINGS,
    Kill,
    differences,
    orchestrator_kills,
    run_programs,
    starts,
    was_killed,
)
from tests.stub_engine import StubEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

VOCABULARY = 96


@pytest.fixture(scope="module")
def engine() -> Iterator[StubEngine]:
    with StubEngine(VOCABULARY) as engine:
        yield engine


@pytest.fixture(scope="module")
def configured(model, engine) -> Callable[..., Config]:
    def build(run_dir: Path, *overrides: str) -> Config:
        return load([*SETTINGS, "parallel=single", "rollout.publish=disk", "rollout.probe_tolerance=1000",
                     f"model.path={model}", f"run.dir={run_dir}",
                     f"rollout.engine.urls=[{engine.url}]", *overrides])

    return build


@pytest.fixture(scope="module")
def alone(configured, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    assert run_programs(configured(run_dir)) == ""
    return run_dir


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILL_SEEDS", "1"))))
def test_an_orchestrator_that_is_killed_leaves_no_trace(seed, alone, configured, tmp_path):
    """In three of its phases; in all of them, several times, beside a real engine: make test-kills."""
    seconds, rng = json.loads((alone / "phases-orchestrator.json").read_text()), random.Random(seed)
    kills = orchestrator_kills(rng.sample(ORCHESTRATOR_PHASES, 3), seconds, rng)
    assert run_programs(configured(tmp_path), *kills) == ""
    assert (starts(configured(tmp_path), "orchestrator"), starts(configured(tmp_path), "rank")) == ([4], [1])
    assert all(was_killed(configured(tmp_path), number) is not None for number in range(len(kills)))
    assert differences(alone, tmp_path) == []


def with_process(engine: StubEngine, name: str, run_dir: Path, act: Callable[[psutil.Process], None]) -> None:
    """From a thread: act(the process of this run that is called `name`), once two steps are logged.

    The engine keeps the third waiting until then.
    """
    metrics, acted = run_dir / "metrics.jsonl", threading.Event()

    def reached() -> bool:
        return metrics.exists() and len(read_jsonl(metrics)) >= 2

    async def hold(*_) -> None:
        while reached() and not acted.is_set():
            await asyncio.sleep(0.05)

    def work() -> None:
        while not reached():
            time.sleep(0.05)
        act(next(process for process in psutil.process_iter(["name", "cmdline"]) if process.info["name"] == name
                 and str(run_dir / "launch.json") in (process.info["cmdline"] or ())))  # a zombie has no command
        acted.set()

    engine.spoil = hold
    threading.Thread(target=work, daemon=True).start()


@pytest.mark.parametrize("layout, rank", [("single", 0), *([("ep2", 1)] if "FAULT_SEEDS" in os.environ else [])])
def test_a_rank_that_hangs_is_named_within_a_minute(layout, rank, engine, configured, tmp_path):
    struck: list[float] = []

    def stop(process: psutil.Process) -> None:
        process.send_signal(signal.SIGSTOP)
        struck.append(time.monotonic())

    with_process(engine, f"rank{rank}", tmp_path, stop)
    with pytest.raises(RunFailed, match=rf"rank {rank} \(pid \d+ on \S+\) of the trainer hangs"):
        run_rl(configured(tmp_path, "run.steps=400", "orchestrator.hang_timeout_s=15", f"parallel={layout}"))
    assert time.monotonic() - struck[0] < 60


def test_an_orchestrator_that_hangs_is_killed_and_started_again(engine, configured, tmp_path, caplog):
    with_process(engine, "orchestrator", tmp_path, lambda process: process.send_signal(signal.SIGSTOP))
    ended = run_rl(configured(tmp_path, "orchestrator.hang_timeout_s=10"))
    assert ended.how is End.FINISHED
    assert "the orchestrator did not answer for orchestrator.hang_timeout_s=10: starting it again" in caplog.text


def test_an_orchestrator_that_is_killed_too_often_ends_the_run(configured, tmp_path):
    kills = [Kill("sampling", 1, program="orchestrator")] * 2
    said = run_programs(configured(tmp_path, "orchestrator.max_restarts=1"), *kills)
    assert "the orchestrator was killed, and had been started again orchestrator.max_restarts=1 times" in said


def test_a_request_to_stop_saves_and_the_same_run_goes_on(alone, engine, configured, tmp_path):
    with_process(engine, "orchestrator", tmp_path, lambda process: process.send_signal(signal.SIGUSR1))
    config = configured(tmp_path, "rollout.engine.wait_timeout_s=60")
    assert run_rl(config).how is End.STOPPED
    assert 0 < saved_steps(tmp_path / "checkpoints")[-1] < config.run.steps
    assert run_programs(configured(tmp_path, "run.resume=true")) == ""
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (alone / "hf" / "model.safetensors").read_bytes()


def test_a_step_that_cannot_be_filled_saves_and_ends_the_run_with_its_reason(configured, tmp_path, monkeypatch):
    """As where everything has been learnt: after two steps no group is mixed any more."""
    monkeypatch.setenv("LEARNT_RUN", str(tmp_path))
    ended = run_rl(configured(tmp_path, "algo.dynamic_sampling=true", "algo.max_collect_rounds=4", "algo.phi=10",
                              "reward.routes.math=tests.rewards.learnt_after_two_steps"))
    assert ended.how is End.UNFILLABLE and ended.why.startswith("step 2: ")
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2 and saved_steps(tmp_path / "checkpoints")[-1] == 2
    assert read_jsonl(tmp_path / "eval.jsonl")[-1]["label"] == "after_rl"
    assert (tmp_path / "hf" / "model.safetensors").is_file()
