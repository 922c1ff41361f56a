"""Steps in which environments, judges, prompts and queues fail, collected as a run does it.

Responder, fleet, HTTP, reward pool and collectors are real; the engine is a stub. A step with faults is the step
without them, but for the responses that met a fault: those fail, train nothing, and are counted.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from aiohttp import web
from transformers import PreTrainedTokenizerFast

from megatron_rl.batch import BudgetFill, StepBatch, UnfillableStep
from megatron_rl.config.load import build
from megatron_rl.config.reward import RewardConfig
from megatron_rl.config.schema import Config
from megatron_rl.handoff import dump
from megatron_rl.observe.failures import TooManyFailures
from megatron_rl.observe.samples import sampled_responses
from megatron_rl.orchestrator.evaluation import summary
from megatron_rl.orchestrator.record import rollout_metrics
from megatron_rl.orchestrator.rollouts import collect_budget
from megatron_rl.orchestrator.serving import Serving, build_collector
from megatron_rl.reward import RewardPool
from megatron_rl.rollout import environment as environment_module
from megatron_rl.types import Finish, Prompt, RolloutGroup, Score
from tests.faults import ANSWERS, ENVIRONMENTS, HANGING_JUDGES, JUDGES, OVER, RESPONSES, full
from tests.stub_engine import StubEngine
from tests.tiny_models import write_tiny_bailing

PROMPTS, SAMPLES, STEPS = 6, 2, 2
BAD = (1, 4)
"""Places, among the prompts of a step, of those that meet a fault."""
COLLECTORS = ("sync", "budgeted", "async")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bailing(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine() -> Iterator[StubEngine]:
    with StubEngine(96, latency_s=0.001) as engine:
        engine.label = 0
        yield engine


@pytest.fixture(autouse=True)
def unspoiled(engine):
    yield
    engine.spoil = None


def judges(timeout_s: float) -> RewardPool:
    return RewardPool(RewardConfig(routes={"math": "tests.faults.judge"}, workers=2, timeout_s=timeout_s,
                                   correct_from=1.0))


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with judges(timeout_s=20.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def impatient_pool() -> Iterator[RewardPool]:
    with judges(timeout_s=0.3) as pool:
        yield pool


def configured(folder, engine, collector: str = "sync", **rollout: Any) -> Config:
    return build({
        "model": {"path": str(folder)}, "algo": {"phi": 20, "order": "groups"},
        "rollout": {"collector": collector, "prompts_per_step": PROMPTS, "responses_per_prompt": SAMPLES,
                    "max_response_tokens": 12, "max_context_tokens": 64, "request_timeout_s": 60.0,
                    "environment": "tests.faults.environment", "environment_timeout_s": 60.0, "max_staleness": 0,
                    "engine": {"urls": [engine.url], "health_interval_s": 0.05, "wait_timeout_s": 60.0},
                    **rollout}})


class Prompts:
    """Prompts 0, 1, 2, ...; those at BAD places have `fault` in their metadata."""

    def __init__(self, fault: dict[str, str]):
        self._fault, self._at = fault, 0

    def next(self, n: int) -> list[Prompt]:
        self._at += n
        return [Prompt(f"p{i}", (5, 6 + i), "", "", "math", self._fault if i % PROMPTS in BAD else {})
                for i in range(self._at - n, self._at)]

    def state_dict(self) -> dict:
        return {}


class Lengths:
    """A judge that cannot fail."""

    async def score(self, prompt: Prompt, response_text: str) -> Score:
        right = len(response_text) % 2 == 0
        return Score(float(right), "correct" if right else "wrong")


@dataclass(frozen=True)
class Collected:
    groups: list[RolloutGroup]
    batches: list[list[StepBatch]]
    metrics: list[dict[str, float]]

    def responses(self) -> dict[tuple[str, int], tuple]:
        """By prompt and sample: what a response is."""
        return {(group.prompt.id, sample): (rollout.token_ids.tolist(), rollout.rollout_logprobs.tolist(),
                                            rollout.finish, text, score.status)
                for group in self.groups
                for sample, (rollout, text, score) in enumerate(zip(group.rollouts, group.texts, group.scores,
                                                                    strict=True))}

    def failed(self) -> dict[tuple[str, int], Score]:
        return {(group.prompt.id, sample): score for group in self.groups
                for sample, score in enumerate(group.scores) if score.failed}


def collected(config: Config, fault: dict[str, str], scorer=None, steps: int = STEPS) -> Collected:
    """The steps of a run, up to where a step would be handed over."""

    async def live() -> Collected:
        async with Serving(config) as serving:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(config.model.path)
            collector = build_collector(config, serving.responder(config, tokenizer, scorer or Lengths()),
                                        Prompts(fault))
            fill = BudgetFill(config.algo, 1, config.rollout.max_response_tokens)
            done = Collected([], [], [])
            for step in range(steps):
                groups, batches, _, _ = await collect_budget(
                    config, lambda round_, step=step: collector.collect(step, round_), step)
                done.groups.extend(groups)
                done.batches.append(batches)
                done.metrics.append(rollout_metrics(groups, fill, version=0))
            return done

    return asyncio.run(live())


def is_bad(key: tuple[str, int]) -> bool:
    return int(key[0][1:]) % PROMPTS in BAD


def equal_but_for_failures(faulty: Collected, well: Collected, *, status: str,
                           meets: Callable[[tuple], bool] = lambda _: True) -> None:
    """meets: whether a response, as it is without faults, comes to where the fault is."""
    known, found, failed = well.responses(), faulty.responses(), faulty.failed()
    expected = {key for key in found.keys() & known.keys() if is_bad(key) and meets(known[key])}
    assert expected and failed.keys() & known.keys() == expected
    assert {score.status for score in failed.values()} == {status}
    compared = [key for key in found.keys() & known.keys() if key not in failed]
    assert compared and all(found[key] == known[key] for key in compared)
    counts = [sum(score.failed for group in step for score in group.scores) / sum(len(group.scores) for group in step)
              for step in by_step(faulty)]
    assert [metrics["rollout/failed_fraction"] for metrics in faulty.metrics] == counts
    assert [metrics.get(f"reward/status/{status}", 0.0) for metrics in faulty.metrics] == counts
    for step, batches in zip(by_step(faulty), faulty.batches, strict=True):
        scores = [score for group in step for score in group.scores]
        kept = [sample.index for batch in batches for sample in batch.samples]
        assert kept and not any(scores[index].failed for index in kept)
        assert sum(batch.selection.selected_tokens for batch in batches) == 20
        rows = sampled_responses(step, len(step), seed=0, step=0)
        assert dump(rows) and max(len(row["detail"]) for row in rows) < 2000


def by_step(run: Collected) -> list[list[RolloutGroup]]:
    """Every step draws PROMPTS prompts a round; those of further rounds belong to the same step."""
    ends = list(itertools.accumulate(len({group.prompt.id for group in run.groups
                                          if (int(group.prompt.id[1:]) // PROMPTS) == step})
                                     for step in range(len(run.metrics))))
    return [run.groups[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.fixture(scope="module")
def well(folder, engine) -> dict[str, Collected]:
    """Without faults, by collector."""
    return {collector: collected(configured(folder, engine, collector), {}) for collector in COLLECTORS}


def stops(response: tuple) -> bool:
    return response[2] is Finish.STOP


@pytest.mark.parametrize("fault", ENVIRONMENTS)
def test_an_environment(fault, folder, engine, well):
    hangs = fault.startswith("hangs")
    limit = {"environment_timeout_s": 4.0} if hangs else {}  # which those that do not hang keep, too
    OVER.clear()
    try:
        faulty = collected(configured(folder, engine, **limit), {"environment": fault}, steps=1 if hangs else STEPS)
    finally:
        OVER.set()
    equal_but_for_failures(faulty, well["sync"], status="environment_error", meets=stops)


@pytest.mark.parametrize("collector", COLLECTORS)
def test_an_environment_in_every_collector(collector, folder, engine, well):
    faulty = collected(configured(folder, engine, collector), {"environment": "raises"})
    equal_but_for_failures(faulty, well[collector], status="environment_error", meets=stops)


def test_an_environment_that_hangs_and_hangs_is_not_asked_any_more(monkeypatch):
    """Threads that hang cannot be ended: their number is bounded."""
    monkeypatch.setattr(environment_module, "MOST_HUNG_CALLS", 3)
    over, calls = threading.Event(), []

    def hang(prompt: Prompt, turns: Sequence[str]) -> str:
        calls.append(prompt)
        over.wait()
        return "late"

    async def ask(threads) -> str:
        try:
            return await threads.answer(Prompt("p", (1,), "", "", "math"), ["turn"])
        except environment_module.EnvironmentFailed as error:
            return str(error).split(": ", 1)[1]

    async def live() -> None:
        threads = environment_module.EnvironmentThreads(hang, threads=1, timeout_s=0.05)
        said = [await ask(threads) for _ in range(5)]
        over.set()
        await asyncio.wait(threads._hung)
        assert len(calls) == 3 and said[3:] == ["it was not called, since 3 earlier calls hang"] * 2
        threads._timeout_s = 60.0
        assert await ask(threads) == "late"

    asyncio.run(live())


@pytest.mark.parametrize("fault", JUDGES)
def test_a_judge(fault, folder, engine, well, pool):
    faulty = collected(configured(folder, engine), {"judge": fault}, pool, steps=1)
    equal_but_for_failures(faulty, well["sync"], status="error")


@pytest.mark.slow
@pytest.mark.parametrize("fault", HANGING_JUDGES)
def test_a_judge_without_an_end_costs_its_response_the_reward(fault, folder, engine, well, impatient_pool):
    slow = collected(configured(folder, engine), {"judge": fault}, impatient_pool, steps=1)
    fast = well["sync"].responses()
    for key, response in slow.responses().items():
        assert response[:4] == fast[key][:4] and response[4] == ("timeout" if is_bad(key) else fast[key][4])
    assert slow.metrics[0]["reward/status/timeout"] == len(BAD) / PROMPTS
    assert slow.metrics[0]["rollout/failed_fraction"] == 0


def spoiled_for(bad: Callable[[dict], bool], spoil: Callable) -> Callable:
    async def answer(request: web.Request, body: dict, answer: dict) -> web.StreamResponse | None:
        return await spoil(request, answer) if bad(body) else None

    return answer


def of_bad_prompt(body: dict) -> bool:
    return body["input_ids"][0] == 5 and (body["input_ids"][1] - 6) % PROMPTS in BAD


@pytest.mark.parametrize("fault", RESPONSES)
def test_a_prompt_that_no_engine_can_answer(fault, folder, engine, well):
    """Its responses fail, soon; the engine serves the others as before. It would rest for minutes if they counted."""
    engine.spoil = spoiled_for(of_bad_prompt, lambda request, answer: RESPONSES[fault](request))
    began, limit = time.monotonic(), {"request_timeout_s": 1.0} if fault == "no answer" else {}
    faulty = collected(configured(folder, engine, **limit), {})
    assert time.monotonic() - began < 120
    equal_but_for_failures(faulty, well["sync"], status="engine_error")


@pytest.mark.parametrize("fault", ANSWERS)
def test_a_prompt_whose_answer_is_never_one(fault, folder, engine, well):
    async def lie(request: web.Request, answer: dict) -> web.Response:
        return web.json_response(ANSWERS[fault](answer))

    engine.spoil = spoiled_for(of_bad_prompt, lie)
    faulty = collected(configured(folder, engine, retries=1), {}, steps=1)
    equal_but_for_failures(faulty, well["sync"], status="engine_error")


@pytest.mark.parametrize("collector", COLLECTORS)
def test_prompts_that_no_engine_can_answer_in_every_collector(collector, folder, engine, well):
    engine.spoil = spoiled_for(of_bad_prompt, lambda request, answer: RESPONSES["refuses: too long"](request))
    equal_but_for_failures(collected(configured(folder, engine, collector), {}), well[collector],
                           status="engine_error")


@pytest.mark.parametrize("room", [1, 3])
def test_a_full_queue_costs_time_and_nothing_else(room, folder, engine, well):
    """The engine never has room for more than `room` requests, and refuses all of them for a while."""
    under_way, refused, began = [0], [0], time.monotonic()

    async def queue(request: web.Request, body: dict, answer: dict) -> web.Response | None:
        if under_way[0] >= room or time.monotonic() - began < 1.5:
            refused[0] += 1
            return full()
        under_way[0] += 1
        await asyncio.sleep(0.02)
        under_way[0] -= 1
        return None

    engine.spoil = queue
    faulty = collected(configured(folder, engine), {})
    assert refused[0] > 4 and faulty.responses() == well["sync"].responses()


def test_a_queue_that_is_full_for_ever_is_said(folder, engine):
    async def queue(request: web.Request, body: dict, answer: dict) -> web.Response:
        return full()

    engine.spoil = queue
    config = configured(folder, engine)
    config = replace(config, rollout=replace(config.rollout, engine=replace(config.rollout.engine, wait_timeout_s=1.0)))
    with pytest.raises(TooManyFailures, match=r"12 of 12 responses failed.*engine_error.*no engine (served|had room "
                                              r"for it) for rollout\.engine\.wait_timeout_s=1.*queue is full"):
        collected(config, {})


def test_a_step_of_which_every_response_fails_ends_the_run_with_its_reason(folder, engine):
    """If rollout.max_failed_fraction allows even that."""
    engine.spoil = spoiled_for(lambda body: True, lambda request, answer: RESPONSES["refuses: too long"](request))
    config = configured(folder, engine, max_failed_fraction=1.0)
    for objective in ("c3po", "grpo"):
        algo = replace(config.algo, objective=objective, order="permuted" if objective != "c3po" else "groups",
                       max_collect_rounds=2)
        with pytest.raises(UnfillableStep, match="step 0: each of 24 responses failed in algo.max_collect_rounds=2"):
            collected(replace(config, algo=algo), {})


def test_an_evaluation_of_which_every_response_fails_says_so(folder, engine):
    engine.spoil = spoiled_for(lambda body: True, lambda request, answer: RESPONSES["refuses: too long"](request))
    config = configured(folder, engine)

    async def live() -> list[RolloutGroup]:
        async with Serving(config) as serving:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            return await serving.responder(config, tokenizer, Lengths()).groups(Prompts({}).next(3), step=0, tag="eval")

    assert summary(asyncio.run(live()), resamples=10, seed=0) == {
        "problems": 3, "samples_per_problem": SAMPLES, "failed_fraction": 1.0}
