"""verifiers holds and judges the conversations of a run, from a virtual environment of its own."""

from __future__ import annotations

import asyncio
import json
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
PROMPTS = [Prompt(place, (1,), place, "by verifiers", "math") for place in ("0", "1")]


def backwards(read: str) -> str:
    """The first two tasks are gbae and ggah."""
    return "eabg" if "gbae" in read else "wrong"


def has_verifiers() -> bool:
    python = os.environ.get(INTERPRETER)
    return python is not None and subprocess.run([python, "-c", "import verifiers.v1"], check=False,
                                                 capture_output=True).returncode == 0


needs_verifiers = pytest.mark.skipif(
    not has_verifiers(), reason=f"{INTERPRETER} names no interpreter with verifiers 0.4, whose pin of openai does not "
    "go with SGLang's (examples/agent_verifiers)")


class NoJudge:
    async def score(self, prompt: Prompt, response_text: str) -> Score:
        raise AssertionError("verifiers gives the rewards")


def environment_of(python: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": ""}


pytestmark = [pytest.mark.slow, needs_verifiers]


def test_verifiers_plays_and_judges_the_sessions_of_a_run(monkeypatch):
    monkeypatch.setenv(GATEWAY_KEY, "a key of both")
    agent = AgentConfig(kind="http", port=choose_port(None), timeout_s=240.0)
    python = Path(os.environ[INTERPRETER])

    async def story():
        async with world(backwards) as it:
            programs = AgentPrograms(replace(it.config, agent=agent), it.fleet, it.tokenizer, seed=0,
                                     verdict=partial(score_of, correct_from=1.0))
            responder = Responder(it.fleet, it.config, it.tokenizer, NoJudge(), seed=0,
                                  eos_token_id=it.tokenizer.eos_token_id, agents=programs)
            server = await asyncio.create_subprocess_exec(
                python, str(SERVER), "play", "backwards_v1", f"http://127.0.0.1:{agent.port}", "2",
                env=environment_of(python))
            try:
                groups = await responder.groups(PROMPTS, step=0)
            finally:
                await programs.close()
            assert await asyncio.wait_for(server.wait(), 60) == 0
            scores = [[(score.value, score.detail) for score in group.scores] for group in groups]
            assert scores == [[(1.0, "")] * 2, [(0.0, "")] * 2]
            rollout = groups[0].rollouts[0]
            assert it.text(rollout.token_ids[rollout.trainable]) == "eabg<|im_end|>"
            assert "user\nA: gbae backwards" in it.text(rollout.token_ids)

    run(story())


def test_the_problems_of_a_run_name_the_tasks_of_the_taskset():
    python = Path(os.environ[INTERPRETER])
    rows = subprocess.run([python, SERVER, "problems", "backwards_v1"], check=True, capture_output=True, text=True)
    problems = [json.loads(row) for row in rows.stdout.splitlines()]
    assert len(problems) == 2000 and problems[:2] == [
        {"prompt": prompt.text, "answer": prompt.answer} for prompt in PROMPTS]
