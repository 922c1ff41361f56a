"""Two engines, one of which fails in the middle of a step: the run ends as if nothing had happened.

FAULT_SEEDS says how often each fault is tried, at how many different moments (`make test-faults`: 10). In a whole run,
with ranks, environments and judges fail; tests/megatron_rl/orchestrator/test_faults.py has every kind of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megatron_rl.config.load import load
from megatron_rl.config.rollout import EngineConfig, RolloutConfig
from megatron_rl.config.schema import Config, ModelConfig, RunConfig
from megatron_rl.launch.programs import run_rl
from megatron_rl.loop import End
from megatron_rl.model.architectures import read_config
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.orchestrator.serving import Serving, build_collector
from megatron_rl.orchestrator.weights import PublishedWeights
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.supervisor import NOTHING_PUBLISHED, Supervisor
from megatron_rl.trainer.sender import Sender
from megatron_rl.types import Prompt, Score
from tests.engine.conftest import client_of
from tests.engine.faulty_proxy import FaultyProxy
from tests.reference_bailing import response_logprobs
from tests.tiny_models import tiny_bailing_weights, write_tiny_bailing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEEDS = range(int(os.environ.get("FAULT_SEEDS", "1")))
STEPS, PROMPTS, SAMPLES, HELD_OUT = 3, 4, 2, 2
PROBE = tuple(range(20, 60))
CPU = torch.device("cpu")
ENGINE = EngineConfig(count=2, max_running_requests=8, max_total_tokens=4096, deterministic=True, health_interval_s=0.5,
                      hang_timeout_s=8.0, start_timeout_s=600.0, max_restarts=1000, wait_timeout_s=900.0)
ROLLOUT = RolloutConfig(prompts_per_step=PROMPTS, responses_per_prompt=SAMPLES, max_response_tokens=24,
                        max_context_tokens=128, concurrency=16, request_timeout_s=120.0, probe_tolerance=1e-4,
                        engine=ENGINE)
FAULTY_ROWS = ({}, {}, {"environment": "raises"}, {}, {"environment": "hangs"}, {"judge": "is killed"},
               {"environment": "returns a text that is not UTF-8"}, {"judge": "returns NaN"})
"""What goes wrong with each problem of a whole run (tests/faults.py)."""
HTTP_FAULTS = ("error", "garbage", "cut", "full")


class Engines:
    """Two supervised servers; `spoiled` is a way to the second through a proxy."""

    def __init__(self, folder: Path, processes: list[EngineProcess], proxy: FaultyProxy):
        self.folder, self.processes, self.proxy = folder, processes, proxy
        self.direct = tuple(process.base_url for process in processes)
        self.spoiled = (self.direct[0], proxy.url)
        self.config = json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Iterator[Engines]:
    folder = write_tiny_bailing(tmp_path_factory.mktemp("model") / "tiny", norm_head=True)
    logs = tmp_path_factory.mktemp("logs")
    processes: list[EngineProcess] = []
    for number in range(2):
        processes.append(EngineProcess.from_config(
            ROLLOUT, folder, log_path=logs / f"engine-{number}.log", weight_version=NOTHING_PUBLISHED,
            taken_ports=[process.port for process in processes]))
    with Supervisor(processes, ENGINE), FaultyProxy(processes[1].base_url) as proxy:
        yield Engines(folder, processes, proxy)


class Prompts:
    """Prompts 0, 1, 2, ..., each of another length."""

    def __init__(self):
        self._at = 0

    def next(self, n: int) -> list[Prompt]:
        self._at += n
        return [prompt(f"p{i}", i) for i in range(self._at - n, self._at)]


def prompt(name: str, number: int) -> Prompt:
    return Prompt(name, tuple(range(5, 8 + number % 5)), "", "", "math")


class Judge:
    """Scores by length, and does something when the given number of responses has been judged."""

    def __init__(self, at: int, act: Callable[[], None]):
        self._left, self._act = at, act
        self.judged: list[str] = []

    async def score(self, prompt: Prompt, response_text: str) -> Score:
        self.judged.append(prompt.id)
        self._left -= 1
        if self._left == 0:
            self._act()
        return Score(float(len(response_text)), "correct")


class Outcome(SimpleNamespace):
    """state: digest of everything that was collected; judged: prompt ids; recovery_s: until both engines served."""


class Trainer:
    """Publishes as the trainer does (trainer/main.py), from weights that this test sets."""

    def __init__(self, config: Config, model: dict, weights: dict[str, torch.Tensor]):
        self._sender, self._weights, self._model = Sender(config, read_config(config.model.path), CPU), weights, model

    async def execute(self, kind: str, *, version: int, urls: list[str], layouts: list) -> dict:
        assert kind == "publish"
        sent = await asyncio.to_thread(self._sender.send, iter(self._weights.items()), version, urls,
                                       layouts=layouts)
        return {**sent, "reference": reference(self._weights, self._model).tolist()}

    def close(self) -> None:
        self._sender.close()


def reference(weights: dict[str, torch.Tensor], model: dict) -> np.ndarray:
    return response_logprobs(weights, model, PROBE[:1], list(PROBE[1:])).numpy()


def run(engines: Engines, urls: tuple[str, str], *, at: int = 10**9,
        fault: Callable[[], None] = lambda: None) -> Outcome:
    """STEPS steps of publish, collect and evaluate, as a run does them, with new weights at every step."""
    config = Config(run=RunConfig(seed=5), model=ModelConfig(path=str(engines.folder)),
                    rollout=replace(ROLLOUT, engine=replace(ENGINE, urls=urls)))
    struck: list[float] = []

    def strike() -> None:
        struck.append(time.monotonic())
        fault()

    judge, digest, weights, seen = Judge(at, strike), hashlib.sha256(), {}, []

    async def live() -> float:
        async with Serving(config) as serving:
            with contextlib.closing(Trainer(config, engines.config, weights)) as trainer:
                published = PublishedWeights(config, trainer, serving.fleet)
                published.probe_tokens = list(PROBE)
                responder = serving.responder(config, PreTrainedTokenizerFast.from_pretrained(engines.folder), judge)
                collector = build_collector(config, responder, Prompts())
                held_out = [prompt(f"e{i}", i) for i in range(HELD_OUT)]
                for step in range(STEPS):
                    weights.update(tiny_bailing_weights(engines.config, seed=100 + step))
                    await published.publish(step)
                    collected, _ = await published.while_serving(collector.collect(step, 0))
                    evaluated = await published.while_serving(responder.groups(held_out, step=step, tag="eval"))
                    for group in [*collected, *evaluated]:
                        for sample, rollout in enumerate(group.rollouts):
                            seen.append((group.prompt.id, sample))
                            digest.update(rollout.token_ids.tobytes() + rollout.rollout_logprobs.tobytes())
                            assert {span.version for span in rollout.weight_versions} == {step}
                while serving.fleet.serving < 2:
                    await published.catch_up()
                    await asyncio.sleep(0.1)
                recovery_s = time.monotonic() - struck[0] if struck else 0.0
                for url in urls:
                    assert np.abs(await probe(url) - reference(weights, engines.config)).max() < 1e-4
                return recovery_s

    recovery_s = asyncio.run(live())
    return Outcome(state=digest.hexdigest(), seen=seen, judged=judge.judged, recovery_s=recovery_s)


async def probe(url: str) -> np.ndarray:
    async with client_of(url, timeout_s=60.0) as client:
        return await client.input_logprobs(PROBE, rid="probe.")


@pytest.fixture(scope="module")
def undisturbed(engines) -> Outcome:
    outcome = run(engines, engines.direct)
    assert outcome.seen == [
        (name, sample) for step in range(STEPS)
        for name in [*(f"p{step * PROMPTS + i}" for i in range(PROMPTS)), *(f"e{i}" for i in range(HELD_OUT))]
        for sample in range(SAMPLES)]
    return outcome


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, int, float, float]]]:
    rows: list[tuple[str, int, float, float]] = []
    yield rows
    print("\n| fault | seed | struck after | both engines serve again after |\n| --- | --- | --- | --- |")
    for fault, seed, at, seconds in rows:
        print(f"| {fault} | {seed} | {at} responses | {seconds:.1f} s |")


def strike(engines: Engines, fault: str) -> Callable[[], None]:
    """What does it to the second engine."""
    victim = engines.processes[1]
    return {
        "kill": lambda: os.kill(victim.pid, signal.SIGKILL),
        "stop": lambda: os.killpg(victim.pid, signal.SIGSTOP),
    }.get(fault, lambda: engines.proxy.arm(fault, 3))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", [*HTTP_FAULTS, "stop", "kill"])
def test_a_run_survives(fault, seed, engines, undisturbed, table):
    """Every (prompt, sample) once, judged once, sampled by the weights of its step; the same tokens and numbers."""
    at = random.Random(f"{fault}{seed}").randrange(1, (STEPS - 1) * (PROMPTS + HELD_OUT) * SAMPLES)
    before = engines.proxy.spoiled
    urls = engines.spoiled if fault in HTTP_FAULTS else engines.direct
    outcome = run(engines, urls, at=at, fault=strike(engines, fault))
    assert outcome.seen == undisturbed.seen
    assert sorted(outcome.judged) == sorted(prompt for prompt, _ in undisturbed.seen)
    assert outcome.state == undisturbed.state
    if fault in HTTP_FAULTS:
        assert engines.proxy.spoiled > before
    table.append((fault, seed, at, outcome.recovery_s))


def test_a_whole_run_of_which_environments_and_judges_fail(engines, tmp_path):
    """It trains each step in full on the other responses, counts those that failed, evaluates, saves and exports."""
    rows = [{"problem": f"{i} + 1 = ", "answer": str(i + 1), **fault} for i, fault in enumerate(10 * FAULTY_ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = tmp_path / "run"
    ended = run_rl(load([
        "experiment=quickstart", "parallel=single", f"model.path={engines.folder}", f"run.dir={run_dir}", "run.steps=3",
        "run.save_every_steps=3", "eval.every_steps=0", "eval.problems=6",
        f"rollout.engine.urls=[{','.join(engines.direct)}]",
        "rollout.engine.deterministic=true", "rollout.prompts_per_step=4", "rollout.responses_per_prompt=4",
        "rollout.max_response_tokens=16", "rollout.max_context_tokens=96", "rollout.max_failed_fraction=0.9",
        "rollout.stop=[a,e,i,o,u,A,E,I,O,U,s,t,S,T]", "rollout.environment=tests.faults.environment",
        "rollout.environment_timeout_s=0.5", "reward.routes.math=tests.faults.judge", "reward.correct_from=1",
        "data.source=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", "data.prompt_key=problem", "data.split=all",
        "algo.phi=40", "observe.wandb=off", "observe.progress=false", "observe.metrics=[]",
        "observe.samples_per_step=4"]))
    assert ended.how is End.FINISHED and (run_dir / "hf" / "model.safetensors").is_file()
    steps = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row["budget/selected_tokens"] == 40 and row["train/skipped_steps"] == 0
        assert row["rollout/failed_fraction"] == pytest.approx(
            row.get("reward/status/error", 0.0) + row.get("reward/status/environment_error", 0.0))
        assert "reward/status/engine_error" not in row
    for status in ("error", "environment_error"):
        assert sum(row.get(f"reward/status/{status}", 0.0) for row in steps) > 0
    assert {row["label"] for row in read_jsonl(run_dir / "eval.jsonl")} == {"before_rl", "after_rl"}
    assert all(row["reward"] == 0 for row in read_jsonl(run_dir / "samples.jsonl") if row["finish"] == "error")
