"""A teacher on a server scores the student's own tokens, is asked again if it fails, and must have its vocabulary."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from aiohttp import web

from megatron_rl.batch import assemble, pack
from megatron_rl.config.distillation import DistillationConfig, TeacherConfig
from megatron_rl.config.load import load
from megatron_rl.config.rollout import EngineConfig, RolloutConfig
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.handoff import dump
from megatron_rl.handoff import load as load_body
from megatron_rl.handoff.shard import UpdateShard, read_shard, write_shard
from megatron_rl.model.architectures import parse_config
from megatron_rl.model.fresh import bailing_config
from megatron_rl.orchestrator.teaching import check_teachers
from megatron_rl.rollout.collectors.open_groups import OpenGroup, OpenResponse, group_from_state, group_to_state
from megatron_rl.rollout.fleet import FleetError
from megatron_rl.rollout.responses import Judged, Responder, Ticket
from megatron_rl.rollout.sampling import GenerateResult
from megatron_rl.rollout.teachers import Teachers
from megatron_rl.rollout.transcript import Transcript
from megatron_rl.trainer.learner import packed_microbatches
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score, TrainSample, VersionSpan
from tests.stub_engine import StubEngine

VOCABULARY = 50
ROLLOUT = RolloutConfig(max_response_tokens=8, max_context_tokens=32, retries=2, request_timeout_s=20.0,
                        engine=EngineConfig(wait_timeout_s=5.0))


def rollout(*tokens: int, prompt: int = 2, others: tuple[Rollout, ...] = ()) -> Rollout:
    ids = np.array(tokens, dtype=np.int32)
    return Rollout(ids, np.arange(len(ids)) >= prompt, np.zeros(len(ids), np.float32), Finish.STOP,
                   (VersionSpan(0, 0, len(ids) - prompt),), others=others)


def by_token(_, body, answer):
    """Each token's log-probability is its id in hundredths, so that a wrong place shows."""
    prompt = body["input_ids"]
    answer["meta_info"]["input_token_logprobs"] = [[None, prompt[0], None],
                                                   *([-token / 100, token, None] for token in prompt[1:])]


def by_rank(_, body, answer):
    """The k most probable tokens after token i are i + 1, i + 2, ..., each less probable by a tenth than the last."""
    by_token(_, body, answer)
    prompt, k = body["input_ids"], body["top_logprobs_num"]
    answer["meta_info"]["input_top_logprobs"] = [None, *(
        [[-0.1 * place, before + place, None] for place in range(1, k + 1)] for before in prompt[:-1])]


def spoiled(count: int):
    """`count` failures, then by_token."""
    left = [count]

    async def spoil(request, body, answer):
        if left[0]:
            left[0] -= 1
            return web.Response(status=500, text="no")
        by_token(request, body, answer)

    return spoil


def teachers_at(*urls: str, **options) -> Teachers:
    return Teachers(DistillationConfig(teachers={"big": TeacherConfig(urls=urls)}, **options), ROLLOUT)


def test_every_sequence_of_a_response_is_scored_token_by_token_and_a_failure_is_asked_again():
    async def scored():
        async with teachers_at(one.url, two.url) as teachers:
            return await teachers.scored(rollout(3, 4, 5, 6, others=(rollout(7, 8, 9),)), "math")

    with StubEngine(VOCABULARY) as one, StubEngine(VOCABULARY) as two:
        one.spoil, two.spoil = spoiled(1), spoiled(1)
        found = asyncio.run(scored())
    assert found.teacher_logprobs.tolist() == pytest.approx([0.0, -0.04, -0.05, -0.06])
    assert found.others[0].teacher_logprobs.tolist() == pytest.approx([0.0, -0.08, -0.09])
    assert found.token_ids.tolist() == [3, 4, 5, 6] and found.teacher_logprobs.dtype == np.float32


def test_domains_choose_their_teachers_and_a_domain_without_one_is_not_asked():
    config = DistillationConfig(teachers={"a": TeacherConfig(urls=("http://127.0.0.1:1",)),
                                          "b": TeacherConfig(checkpoint="folder"),
                                          "c": TeacherConfig(urls=("http://127.0.0.1:2",))},
                                routes={"math": "c", "code": "b", "science": "a"})
    assert [config.place_of(domain) for domain in ("math", "code", "science", "chat")] == [2, 1, 0, -1]
    teachers = Teachers(config, ROLLOUT)
    given = rollout(1, 2, 3)
    for domain in ("code", "chat"):  # the ranks hold the first, the other has none
        assert asyncio.run(teachers.scored(given, domain)) is given


class Text:
    def decode(self, token_ids, *, skip_special_tokens):
        return ""


class Right:
    async def score(self, prompt, text):
        return Score(1.0, "correct")


def test_a_teacher_that_is_gone_costs_the_response_and_not_the_run():
    async def respond(url):
        async with teachers_at(url) as teachers:
            responder = Responder(None, ROLLOUT, Text(), Right(), seed=0, eos_token_id=0, teachers=teachers)
            result = GenerateResult(np.array([5, 6], np.int32), np.zeros(2, np.float32), Finish.STOP, {},
                                    (VersionSpan(0, 0, 2),), 0, 0)
            transcript = Transcript().extended(result, finish=Finish.STOP)
            return await responder.judge(Prompt("id", (3, 4), "", "", "math"), transcript)

    with StubEngine(VOCABULARY) as engine:
        engine.spoil = spoiled(0)
        good = asyncio.run(respond(engine.url))
        engine.spoil = spoiled(1000)
        bad = asyncio.run(respond(engine.url))
    assert good.score.status == "correct"
    assert good.rollout.teacher_logprobs.tolist() == pytest.approx([0.0, -0.04, -0.05, -0.06])
    assert bad.score.status == "engine_error" and "teacher-" in bad.score.detail
    assert bad.rollout.teacher_logprobs is None


@pytest.mark.parametrize(("vocabulary", "status"), [(8, "correct"), (7, "engine_error")])
def test_a_token_that_the_student_does_not_have_costs_the_response(vocabulary, status):
    """Its logit would be 0, whatever the student thinks."""
    async def respond(url):
        async with teachers_at(url, top_k=2) as teachers:
            responder = Responder(None, ROLLOUT, Text(), Right(), seed=0, eos_token_id=0, teachers=teachers,
                                  vocabulary=vocabulary)
            result = GenerateResult(np.array([5, 6], np.int32), np.zeros(2, np.float32), Finish.STOP, {},
                                    (VersionSpan(0, 0, 2),), 0, 0)
            transcript = Transcript().extended(result, finish=Finish.STOP)
            return await responder.judge(Prompt("id", (3, 4), "", "", "math"), transcript)

    async def spoil(request, body, answer):
        by_rank(request, body, answer)

    with StubEngine(VOCABULARY) as engine:
        engine.spoil = spoil
        judged = asyncio.run(respond(engine.url))
    assert judged.score.status == status
    assert status == "correct" or "names token 7, but the model's vocabulary has 7" in judged.score.detail


def test_runs_that_share_a_server_name_their_requests_apart():
    """An engine refuses an id that is under way, and in containers orchestrators have the same process id."""
    asked = []

    async def heard(request, body, answer):
        asked.append(body["rid"])
        by_token(request, body, answer)

    async def score():
        async with teachers_at(engine.url) as teachers:
            await teachers.scored(rollout(3, 4, 5), "math")

    with StubEngine(VOCABULARY) as engine:
        engine.spoil = heard
        asyncio.run(score())
        asyncio.run(score())
    assert len(set(asked)) == 2


def test_another_vocabulary_is_refused_by_its_hash():
    async def check(texts):
        async with teachers_at(engine.url) as teachers:
            await teachers.check_vocabulary(texts)

    own = [f"<{token}>" for token in range(VOCABULARY)]
    with StubEngine(VOCABULARY) as engine:
        asyncio.run(check(own))
        for other in ([*own[:-1], "x"], [own[1], own[0], *own[2:]]):
            with pytest.raises(ValueError, match=rf"teachers.big.urls: {engine.url} has another vocabulary \(hash"):
                asyncio.run(check(other))
    with pytest.raises(ValueError, match="cannot be asked for its vocabulary"):
        asyncio.run(check(own))


def test_scores_travel_with_their_tokens_to_the_packed_microbatch():
    config = DistillationConfig(teachers={"a": TeacherConfig(urls=("http://x",)), "b": TeacherConfig(checkpoint="f")},
                                routes={"math": "a", "code": "b"})
    algo = AlgoConfig(phi=6, distillation=config)
    taught = replace(rollout(3, 4, 5, 6, 7), teacher_logprobs=np.array([0, -4, -5, -6, -7], np.float32))
    groups = [RolloutGroup(Prompt(domain, (3, 4), "", "", domain), (each,), ("",), (Score(1.0, "correct"),))
              for domain, each in (("math", taught), ("code", rollout(1, 2, 3, 4)), ("chat", rollout(1, 2, 9)))]
    [batch] = assemble(groups, algo, dp=1, seed=0, step=0, max_response_tokens=8)
    samples = tuple(sorted(batch.samples, key=lambda sample: sample.index))
    assert [sample.teacher for sample in samples] == [0, 1, -1]
    [update] = read_shard(write_shard([UpdateShard(samples, (3,), (0,), 6, 6, 3)]))
    packed = pack(update.samples, multiple_of=4)
    nobody = [None] * 5 + [None] * (packed.num_tokens - 9)
    assert [None if np.isnan(value) else value for value in packed.teacher_logprobs.tolist()] == [
        -4.0, -5.0, -6.0, -7.0, *nobody]
    assert packed.teachers.tolist() == [0] * 4 + [1] * 3 + [-1] * (packed.num_tokens - 7)


def test_the_most_probable_tokens_travel_too():
    """From the server to the micro-batch, and through the state of a response that waits for its group."""
    async def scored():
        async with teachers_at(engine.url, top_k=2) as teachers:
            return await teachers.scored(rollout(3, 4, 5, 6), "math")

    async def spoil(request, body, answer):
        by_rank(request, body, answer)

    with StubEngine(VOCABULARY) as engine:
        engine.spoil = spoil
        taught = asyncio.run(scored())
    assert taught.teacher_ids.tolist() == [[0, 0], [4, 5], [5, 6], [6, 7]] and taught.teacher_ids.dtype == np.int32
    assert np.allclose(taught.teacher_logprobs, [[0, 0], *[[-0.1, -0.2]] * 3])

    prompt, transcript = Prompt("id", (3, 4), "", "", "math"), Transcript(
        np.array([5, 6], np.int32), np.ones(2, bool), np.zeros(2, np.float32), (VersionSpan(0, 0, 2),), Finish.STOP)
    ticket = Ticket(prompt, "train", 0, 0, 0)
    response = OpenResponse(ticket, transcript, Judged(taught, "", Score(1.0, "correct")))
    [kept] = group_from_state(load_body(dump(group_to_state(OpenGroup(prompt, 0, [response]))))).responses
    assert np.array_equal(kept.judged.rollout.teacher_ids, taught.teacher_ids)

    algo = AlgoConfig(phi=6, distillation=DistillationConfig(
        {"a": TeacherConfig(urls=("http://x",)), "b": TeacherConfig(checkpoint="f")}, {"math": "a", "code": "b"},
        top_k=2))
    groups = [RolloutGroup(Prompt(domain, (3, 4), "", "", domain), (each,), ("",), (Score(1.0, "correct"),))
              for domain, each in (("math", taught), ("code", rollout(1, 2, 3, 4, 5)))]
    [batch] = assemble(groups, algo, dp=1, seed=0, step=0, max_response_tokens=8)
    samples = tuple(sorted(batch.samples, key=lambda sample: sample.index))
    [update] = read_shard(write_shard([UpdateShard(samples, (2,), (0,), 6, 6, 2)]))
    for cp_size in (1, 2):
        for cp_rank in range(cp_size):
            packed = pack(update.samples, multiple_of=4, cp_size=cp_size, cp_rank=cp_rank, top_k=2)
            said = ~packed.teacher_logprobs.isnan()
            assert said.any(1).tolist() == said.all(1).tolist() == (packed.teachers == 0).tolist()
            before = packed.input_ids[said.all(1)]
            assert packed.teacher_ids[said.all(1)].tolist() == [[int(x) + 1, int(x) + 2] for x in before]


@pytest.mark.parametrize("answer", [
    lambda k: [[[-0.1, 1, None]] * (k + 1)], lambda k: [[[float("nan"), 1, None]] * k], lambda k: [None],
    lambda k: [[[-0.1, 1, None]] * (k + 1), [[-0.1, 1, None]] * (k - 1)]])
def test_a_malformed_answer_about_the_most_probable_tokens_is_a_failure(answer):
    async def spoil(request, body, found):
        by_rank(request, body, found)
        places = answer(2)
        found["meta_info"]["input_top_logprobs"][1:1 + len(places)] = places

    async def scored():
        async with teachers_at(engine.url, top_k=2) as teachers:
            await teachers.scored(rollout(3, 4, 5), "math")

    with StubEngine(VOCABULARY) as engine:
        engine.spoil = spoil
        with pytest.raises(FleetError, match="no response after 3 attempts"):
            asyncio.run(scored())


@pytest.mark.parametrize(("overrides", "said"), [
    (["algo.distillation.top_k=-1"], "top_k=-1 must not be negative"),
    (["algo.distillation.top_k=4"], "top_k=4 needs algo.distillation.teachers"),
    (["algo.distillation.divergence=forward"], "divergence=forward needs algo.distillation.top_k > 0"),
    (["algo.distillation.top_k_of=student"], "top_k_of=student needs algo.distillation.top_k > 0"),
    (["algo.distillation.teachers={a: {urls: [http://x]}}", "algo.distillation.top_k=4",
      "algo.distillation.top_k_of=student"], "top_k_of=student, but a has urls: SGLang scores one list of tokens"),
    (["algo.distillation.teachers={a: {}}"], "has a checkpoint or urls: set one"),
    (["algo.distillation.teachers={a: {checkpoint: x, urls: [http://x]}}"], "has a checkpoint or urls: set one"),
    (["algo.distillation.teachers={a: {urls: [x]}}"], "must look like http"),
    (["algo.distillation.teachers={a: {checkpoint: x, api_key_env: K}}"], "api_key_env=K says nothing of a teacher by"),
    (["algo.distillation.teachers={a: {checkpoint: x}, b: {checkpoint: y}}"], "say in algo.distillation.routes"),
    (["algo.distillation.teachers={a: {checkpoint: x}}", "algo.distillation.routes={math: c}"], "math=c is no teacher"),
    (["algo.distillation.teachers={a: {checkpoint: x}, b: {checkpoint: y}}", "algo.distillation.routes={math: a}"],
     "no domain has b"),
    (["algo.distillation.coef=0"], "coef=0.0 must be positive"),
    (["algo.distillation.teachers={a: {checkpoint: x}}", "algo.distillation.task_reward=false",
      "algo.dynamic_sampling=true"], "use algo.dynamic_sampling=false"),
    (["algo.distillation.task_reward=false", "algo.hooks.advantage=my.own"], "algo.hooks.advantage=my.own with"),
    (["algo.distillation.task_reward=false", "algo.truncated=overlong_penalty", "algo.overlong_buffer_tokens=4"],
     "algo.truncated=overlong_penalty with algo.distillation.task_reward=false"),
])
def test_a_wrong_section_is_named(overrides, said):
    with pytest.raises(ValueError, match=said):
        load(overrides)


def test_a_key_that_is_not_there_is_named_before_the_start():
    config = load(["algo.distillation.teachers={a: {urls: [http://x], api_key_env: NO_SUCH_KEY}}"])
    with pytest.raises(ValueError, match="teachers.a.api_key_env: the environment variable NO_SUCH_KEY is not set"):
        check_teachers(config, None)


def test_without_the_tasks_reward_every_domain_needs_a_teacher():
    only = DistillationConfig(teachers={"a": TeacherConfig(checkpoint="x")}, routes={"math": "a"}, task_reward=False)
    only.check_domains({"math"})
    with pytest.raises(ValueError, match="task_reward=false, but domain code has no teacher"):
        only.check_domains({"math", "code"})
    replace(only, task_reward=True).check_domains({"math", "code"})
    with pytest.raises(ValueError, match=r"domain math has no teacher: add algo\.distillation\.teachers"):
        DistillationConfig(task_reward=False).check_domains({"math"})


def test_sft_packs_nothing_for_teachers():
    """Its loss takes no log-probabilities of chosen tokens, and a file of RL may give its algo.distillation too."""
    config = load(["algo.distillation.teachers={a: {checkpoint: x}}", "algo.distillation.top_k=4"])
    here = SimpleNamespace(dp_rank=0, cp_size=1, cp_rank=0, device="cpu")
    sample = TrainSample(0, np.arange(5, dtype=np.int32), np.ones(5, bool), np.zeros(5, np.float32), 0.0, 4)
    [packed] = packed_microbatches([sample], config, here, parse_config(bailing_config(), "a model"))
    assert packed.teacher_ids is None
