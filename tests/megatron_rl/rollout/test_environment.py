"""Turns: what the environment says is context, what the model says is trained on."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from examples.calculator_tool.calculator import evaluate, step
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.rollout import environment as environment_module
from megatron_rl.rollout.environment import EnvironmentThreads, load_environment
from megatron_rl.rollout.fleet import FleetError, Tally
from megatron_rl.rollout.responses import Responder
from megatron_rl.rollout.sampling import GenerateResult, SamplingParams
from megatron_rl.types import Finish, Prompt, Score, VersionSpan
from tests.megatron_rl.rollout.scripted import run

PROMPT = Prompt("p", tuple(map(ord, "Q")), "Q", "", "math")
CONFIG = RolloutConfig(prompts_per_step=1, responses_per_prompt=2, max_response_tokens=40, max_context_tokens=64,
                       environment="examples.calculator_tool.calculator.step", max_turns=3)


class Characters:
    def decode(self, token_ids, *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, token_ids))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(map(ord, text))


class Speaker:
    """A fleet whose model says the given turns, one per request, and keeps what it was asked to continue."""

    def __init__(self, *turns: str):
        self._turns = list(turns)
        self.inputs: list[str] = []

    async def generate(self, input_ids: Sequence[int], *, rid: str, sampling: SamplingParams, tally: Tally,
                       routed_layers: None = None) -> GenerateResult:
        self.inputs.append("".join(map(chr, input_ids)))
        said = np.array([ord(c) for c in self._turns.pop(0)][: sampling.max_new_tokens], np.int32)
        finish = Finish.LENGTH if len(said) == sampling.max_new_tokens else Finish.STOP
        return GenerateResult(said, np.full(len(said), -1.0, np.float32), finish, {}, (VersionSpan(3, 0, len(said)),),
                              0, 0)


class Judge:
    async def score(self, prompt: Prompt, response_text: str) -> Score:
        return Score(0.0, "wrong")


def respond(speaker: Speaker, config: RolloutConfig = CONFIG):
    responder = Responder(speaker, config, Characters(), Judge(), seed=0, eos_token_id=0)
    return asyncio.run(responder.respond(responder.tickets(PROMPT, step=0, index=0)[0], responder.plan))


def test_tool_tokens_are_context_and_never_trained_on():
    speaker = Speaker("<calc>2*3</calc>", "so 6")
    rollout = respond(speaker).rollout
    assert speaker.inputs == ["Q", "Q<calc>2*3</calc>=6\n"]
    assert "".join(map(chr, rollout.token_ids)) == "Q<calc>2*3</calc>=6\nso 6"
    said = [False] + [True] * 16 + [False] * 3 + [True] * 4
    assert rollout.trainable.tolist() == said
    assert rollout.rollout_logprobs.tolist() == [-1.0 if each else 0.0 for each in said]
    assert rollout.weight_versions == (VersionSpan(3, 0, 16), VersionSpan(3, 19, 23))
    assert rollout.finish is Finish.STOP and rollout.response_tokens == 20


def test_the_last_turn_allowed_is_not_answered():
    speaker = Speaker(*["<calc>1</calc>"] * 5)
    respond(speaker, replace(CONFIG, max_turns=2))
    assert len(speaker.inputs) == 2


@pytest.mark.parametrize("turns, length", [
    (("<calc>1+1</calc>", "x" * 30), 40),  # 16 said, 3 answered, room for 21 more
    (("x" * 21 + "<calc>11+1</calc>", "y"), 38),  # 38 said: the answer of 4 leaves no room to go on
])
def test_turns_and_answers_share_one_limit(turns, length):
    rollout = respond(Speaker(*turns)).rollout
    assert len(rollout.token_ids) - 1 == length
    assert rollout.finish is Finish.LENGTH


def raises(prompt: Prompt, turns: Sequence[str]) -> str:
    raise KeyError("no such tool")


def exits(prompt: Prompt, turns: Sequence[str]) -> str:
    raise SystemExit(3)


@pytest.mark.parametrize(("function", "limit_s", "said"), [
    (raises, 60.0, "prompt 'p': KeyError: 'no such tool'"),
    (exits, 60.0, "prompt 'p': SystemExit: 3"),
    (lambda prompt, turns: next(iter(())), 60.0, "prompt 'p': RuntimeError: StopIteration: "),
    (lambda prompt, turns: time.sleep(600), 0.05, "prompt 'p': no answer within rollout.environment_timeout_s=0.05"),
    (lambda prompt, turns: 7, 60.0, "prompt 'p': it returned a int, not a str or None"),
    (lambda prompt, turns: b"bytes", 60.0, "prompt 'p': it returned a bytes, not a str or None"),
], ids=["raises", "exits", "stops", "hangs", "number", "bytes"])
def test_an_environment_that_fails_fails_its_response_alone(monkeypatch, function, limit_s, said):
    monkeypatch.setattr("examples.calculator_tool.calculator.step", function)
    judged = respond(Speaker("abc"), replace(CONFIG, environment_timeout_s=limit_s))
    assert (judged.score.status, judged.score.value, judged.score.failed) == ("environment_error", 0.0, True)
    assert judged.score.detail == f"rollout.environment, {said}"
    assert judged.rollout.finish is Finish.ERROR
    assert judged.text == "abc" and judged.rollout.response_tokens == 3, "what was sampled is kept to be looked at"


class NoEngine(Speaker):
    async def generate(self, *args, **kwargs) -> GenerateResult:
        if not self._turns:
            raise FleetError("request train-0: no response after 4 attempts")
        return await super().generate(*args, **kwargs)


@pytest.mark.parametrize("turns", [(), ("<calc>1</calc>",)], ids=["at_once", "second_turn"])
def test_a_request_that_no_engine_answers_fails_its_response_alone(turns):
    judged = respond(NoEngine(*turns))
    assert judged.score.status == "engine_error" and "no response after 4 attempts" in judged.score.detail
    assert judged.rollout.finish is Finish.ERROR
    assert judged.rollout.response_tokens == sum(map(len, turns))


def answers(function, *, threads: int, calls: int, timeout_s: float) -> list[str | None]:
    async def all_at_once() -> list[str | None]:
        pool = EnvironmentThreads(function, threads=threads, timeout_s=timeout_s)
        return await asyncio.gather(*(pool.answer(PROMPT, [str(number)]) for number in range(calls)))

    return asyncio.run(all_at_once())


def test_as_many_environments_run_at_once_as_configured():
    """More than asyncio's own pool has threads on this machine."""
    threads = min(32, os.cpu_count() + 4) + 8
    together = threading.Barrier(threads)

    def meet(prompt: Prompt, turns: Sequence[str]) -> str:
        together.wait(timeout=120.0)
        return turns[-1]

    assert answers(meet, threads=threads, calls=threads, timeout_s=240.0) == [str(i) for i in range(threads)]


def test_waiting_for_a_thread_is_not_the_environments_fault(monkeypatch):
    """Six calls take turns in one thread. Each takes 0.9 s of a simulated clock and may take 1 s."""
    monkeypatch.setattr(environment_module, "in_thread", lambda call, *args, daemon: asyncio.ensure_future(
        asyncio.sleep(0.9, "text")))

    async def all_at_once() -> list[str | None]:
        pool = EnvironmentThreads(raises, threads=1, timeout_s=1.0)
        said = await asyncio.gather(*(pool.answer(PROMPT, [str(number)]) for number in range(6)))
        assert asyncio.get_running_loop().time() == pytest.approx(6 * 0.9)
        return said

    assert run(all_at_once()) == ["text"] * 6


HANGS = """
import asyncio, time
from megatron_rl.rollout.environment import EnvironmentFailed, EnvironmentThreads
from megatron_rl.types import Prompt
pool = EnvironmentThreads(lambda prompt, turns: time.sleep(900), threads=2, timeout_s=0.1)
async def ask():
    await pool.answer(Prompt("p", (1,), "", "", "math"), ["turn"])
try:
    asyncio.run(ask())
except EnvironmentFailed:
    print("named")
"""


def test_an_environment_that_hangs_does_not_keep_the_run_from_ending():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", HANGS], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "named\n"), done.stderr


@pytest.mark.parametrize("path", ["nowhere.step", "examples.calculator_tool.calculator.nothing", "step"])
def test_an_environment_that_is_not_there_is_named(path):
    with pytest.raises(ValueError, match=f"rollout.environment={path}"):
        load_environment(path)


@pytest.mark.parametrize("call, result", [
    ("12*(3+4)", "=84\n"), ("-2/8", "=-0.25\n"), ("1/0", "=error\n"), ("2**9", "=error\n"), ("1+", "=error\n")])
def test_the_calculator_answers_calls(call, result):
    assert step(PROMPT, ["earlier", f"text <calc>{call}</calc>"]) == result


def test_the_calculator_answers_nothing_else():
    assert step(PROMPT, ["no call"]) is None
    assert step(PROMPT, ["<calc>__import__('os')</calc>"]) is None
    with pytest.raises(KeyError):
        evaluate("abs(1)")
