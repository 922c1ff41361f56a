"""An environment server whose conversations are held and judged by verifiers 0.4, in a virtual environment of its own.

    MEGATRON_RL_GATEWAY_KEY=... python server.py http://127.0.0.1:8100 [workers]

For each session of the run it makes a task of verifiers and lets an agent of verifiers play it. The agent's model is
the session; its program is verifiers' plain chat loop, started by uv as a process. It imports nothing of this project.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import httpx
import verifiers.v1 as vf

WAIT_FOR_RUN_S = 600.0
MOST_TURNS = 4
SYSTEM = "Give the result in \\boxed{}."


class Problem(vf.TaskData):
    """A problem of the run and its answer."""

    answer: str


class ProblemTask(vf.Task[Problem, vf.State]):
    @vf.reward
    async def right(self, task: Problem, trace: vf.Trace) -> float:
        return float(f"\\boxed{{{task.answer}}}" in trace.last_reply)


async def play(gateway: str, session: dict[str, Any]) -> float:
    """The reward of one conversation. RuntimeError if verifiers could not hold it."""
    variable = f"SESSION_{session['id']}"  # verifiers reads keys from the environment
    os.environ[variable] = session["api_key"]
    agent = vf.Agent(vf.AgentConfig(
        harness={"id": "null"}, runtime=vf.SubprocessConfig(), model="policy", max_turns=MOST_TURNS,
        client=vf.EvalClientConfig(base_url=f"{gateway}/v1", api_key_var=variable)))
    asked = session["task"]
    problem = Problem(prompt=asked["text"], system_prompt=SYSTEM, answer=asked["answer"])
    try:
        trace = await agent.run(ProblemTask(problem))
    finally:
        del os.environ[variable]
    if trace.has_error:
        raise RuntimeError(f"verifiers: {trace.last_error.type}: {trace.last_error.message}")
    return trace.reward


async def work(gateway: str, http: httpx.AsyncClient) -> None:
    """Sessions, one after another, until the gateway is gone."""
    begun, seen = time.monotonic(), False
    while True:
        try:
            opened = await http.post(f"{gateway}/sessions")
        except httpx.TransportError:  # not there yet, or no longer
            if seen or time.monotonic() - begun > WAIT_FOR_RUN_S:
                return
            await asyncio.sleep(1)
            continue
        opened.raise_for_status()
        seen = True
        if opened.status_code == 204:
            continue
        session = opened.json()
        where, ending = f"{gateway}/sessions/{session['id']}", {}
        try:
            (await http.post(f"{where}/reward", json={"reward": await play(gateway, session)})).raise_for_status()
        except RuntimeError as error:
            ending = {"error": str(error)}
        await http.post(f"{where}/end", json=ending)


async def serve(gateway: str, workers: int) -> None:
    key = {"Authorization": f"Bearer {os.environ['MEGATRON_RL_GATEWAY_KEY']}"}
    async with httpx.AsyncClient(headers=key, timeout=60.0) as http:
        await asyncio.gather(*(work(gateway, http) for _ in range(workers)))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1].rstrip("/"), int(sys.argv[2]) if len(sys.argv) > 2 else 4))
