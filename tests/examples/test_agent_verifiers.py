"""verifiers holds and judges the conversations of a run, from a virtual environment of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megatron_rl.config.agent import GATEWAY_KEY, AgentConfig
from megatron_rl.environment.agents import AgentPrograms
from megatron_rl.reward.user import score_of
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.responses import Responder
from megatron_rl.types import Prompt, Score
from tests.megatron_rl.environment.world import run, world

SERVER = Path(__file__).resolve().parents[2] / "examples" / "agent_verifiers" / "server.py"
INTERPRETER = "VERIFIERS_PYTHON"
PROMPTS = [Prompt("right", (1,), "6*7=", "42", "math"), Prompt("wrong", (1,), "6*8=", "48", "math")]


def has_verifiers() -> bool:
    python = os.environ.get(INTERPRETER)
    return python is not None and subprocess.run([python, "-c", "import verifiers.v1"], check=False,
                                                 capture_output=True).returncode == 0


class NoJudge:
    async def score(self, prompt: Prompt, response_text: str) -> Score:
        raise AssertionError("verifiers gives the rewards")


@pytest.mark.slow
@pytest.mark.skipif(not has_verifiers(), reason=f"{INTERPRETER} names no interpreter with verifiers 0.4, whose pin of "
                    "openai does not go with SGLang's (examples/agent_verifiers)")
def test_verifiers_plays_and_judges_the_sessions_of_a_run(monkeypatch):
    monkeypatch.setenv(GATEWAY_KEY, "a key of both")
    agent = AgentConfig(kind="http", port=choose_port(None), timeout_s=240.0)
    python = Path(os.environ[INTERPRETER])

    async def story():
        async with world(lambda read: "It is \\boxed{42}.") as it:
            programs = AgentPrograms(replace(it.config, agent=agent), it.fleet, it.tokenizer, seed=0,
                                     verdict=partial(score_of, correct_from=1.0))
            responder = Responder(it.fleet, it.config, it.tokenizer, NoJudge(), seed=0,
                                  eos_token_id=it.tokenizer.eos_token_id, agents=programs)
            server = await asyncio.create_subprocess_exec(
                python, str(SERVER), f"http://127.0.0.1:{agent.port}", "2",
                env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": ""})
            try:
                groups = await responder.groups(PROMPTS, step=0)
            finally:
                await programs.close()
            assert await asyncio.wait_for(server.wait(), 60) == 0
            scores = [[(score.value, score.detail) for score in group.scores] for group in groups]
            assert scores == [[(1.0, "")] * 2, [(0.0, "")] * 2]
            rollout = groups[0].rollouts[0]
            assert it.text(rollout.token_ids[rollout.trainable]) == "It is \\boxed{42}.<|im_end|>"
            assert "system\nGive the result" in it.text(rollout.token_ids)

    run(story())
