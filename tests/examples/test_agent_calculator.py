"""The calculator agent as a run starts it: a program with the SDK, calls parsed by SGLang, one response at the end."""

from __future__ import annotations

import asyncio
import json
import runpy
import socket
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from examples.agent_calculator import agent
from examples.agent_calculator.agent import calculate
from megatron_rl.config.agent import GATEWAY_KEY, AgentConfig
from megatron_rl.environment.agents import AgentPrograms
from megatron_rl.reward.user import score_of
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.responses import Responder
from megatron_rl.types import Finish, Prompt, Score
from tests.megatron_rl.environment.world import run, world

AGENT = Path(__file__).resolve().parents[2] / "examples" / "agent_calculator" / "agent.py"
PROMPT = Prompt("sum", (1,), "What is (12 + 30) * 2?", "84", "math")
CALL = '<tool_call>\n{{"name": "calculate", "arguments": {}}}\n</tool_call>'


def model(read: str) -> str:
    """Adds, multiplies what it was told, and answers what it was told then."""
    told = [part.split("\n</tool_response>")[0] for part in read.split("<tool_response>\n")[1:]]
    if not told:
        return CALL.format(json.dumps({"operation": "add", "a": 12, "b": 30}))
    if len(told) == 1:
        return CALL.format(json.dumps({"operation": "multiply", "a": int(told[0]), "b": 2}))
    return f"It is \\boxed{{{told[1]}}}."


class Judge:
    async def score(self, prompt: Prompt, response_text: str) -> Score:
        return Score(1.0, "correct") if f"boxed{{{prompt.answer}}}" in response_text else Score(0.0, "wrong")


def test_the_agent_solves_a_problem_that_needs_two_calls():
    agent = AgentConfig(kind="command", command=(sys.executable, str(AGENT)), tool_call_parser="qwen25",
                        timeout_s=240.0)

    async def story():
        async with world(model) as it:
            programs = AgentPrograms(replace(it.config, agent=agent), it.fleet, it.tokenizer, seed=0, verdict=Score)
            responder = Responder(it.fleet, it.config, it.tokenizer, Judge(), seed=0,
                                  eos_token_id=it.tokenizer.eos_token_id, agents=programs)
            try:
                judged = await responder.respond(responder.tickets(PROMPT, step=0, index=0)[0], responder.plan)
            finally:
                await programs.close()
            assert (judged.score.status, judged.rollout.finish) == ("correct", Finish.STOP), judged.score.detail
            said = it.text(judged.rollout.token_ids[judged.rollout.trainable])
            assert said.count("<tool_call>") == 2 and said.endswith("It is \\boxed{84}.<|im_end|>")
            given = it.text(judged.rollout.token_ids[~judged.rollout.trainable])
            assert "<tool_response>\n42\n</tool_response>" in given and "<tool_response>\n84\n</tool_response>" in given
            assert programs.take_metrics(0)["agent/turns_mean"] == 3

    run(story())


def test_the_environment_server_solves_it_from_outside_and_ends_with_the_run(monkeypatch):
    monkeypatch.setenv(GATEWAY_KEY, "a key of both")
    agent = AgentConfig(kind="http", port=choose_port(None), tool_call_parser="qwen25", timeout_s=240.0)

    async def story():
        async with world(model) as it:
            programs = AgentPrograms(replace(it.config, agent=agent), it.fleet, it.tokenizer, seed=0,
                                     verdict=partial(score_of, correct_from=1.0))
            responder = Responder(it.fleet, it.config, it.tokenizer, Judge(), seed=0,
                                  eos_token_id=it.tokenizer.eos_token_id, agents=programs)
            server = await asyncio.create_subprocess_exec(
                sys.executable, str(AGENT.with_name("server.py")), f"http://127.0.0.1:{agent.port}", "2")
            try:
                [group] = await responder.groups([PROMPT], step=0)
            finally:
                await programs.close()
            assert await asyncio.wait_for(server.wait(), 60) == 0
            assert [score.value for score in group.scores] == [1.0, 1.0], group.scores
            assert it.text(group.rollouts[1].token_ids).count("<tool_response>") == 2

    run(story())


def test_a_worker_that_did_not_meet_the_run_ends_with_it_too(monkeypatch):
    """The others may have done all there was while it waited for a second try."""
    monkeypatch.setenv(GATEWAY_KEY, "a key of both")
    monkeypatch.setitem(sys.modules, "agent", agent)
    server, met = runpy.run_path(str(AGENT.with_name("server.py"))), threading.Event()
    met.set()
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for a run that is over"))
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))  # nothing listens there
        server["work"](f"http://127.0.0.1:{port.getsockname()[1]}", met)


@pytest.mark.parametrize(("arguments", "result"), [
    ('{"operation": "subtract", "a": 3, "b": 5}', "-2"),
    ('{"operation": "divide", "a": 3, "b": 5}', "error: KeyError: 'divide'"),
    ('{"operation": "add", "a": "x", "b": 5}', "error: ValueError: invalid literal for int() with base 10: 'x'"),
    ("{", "error: JSONDecodeError: "),
    ("[]", "error: TypeError: "),
])
def test_a_call_that_makes_no_sense_is_told_to_the_model(arguments, result):
    assert calculate(arguments).startswith(result)
