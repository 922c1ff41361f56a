"""An environment server that plays an environment of verifiers 0.4, in a virtual environment of its own.

    python server.py problems TASKSET > problems.jsonl            # what data.path of the run names
    MEGATRON_RL_GATEWAY_KEY=... python server.py play TASKSET http://127.0.0.1:8100 [workers]

TASKSET is the id of an installed taskset of verifiers, from its hub or your own, such as backwards_v1 beside this file.
A session of the run is one episode of its environment for a single agent, whose model is the session; verifiers holds
the conversation and gives the reward. It imports nothing of this project.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.clients import ModelContext
from verifiers.v1.envs.single_agent import SingleAgentEnv, SingleAgentEnvConfig

WAIT_FOR_RUN_S = 600.0
MOST_TURNS = 4


class Player:
    """The environment of a taskset, whose agent is verifiers' plain chat loop, started by uv as a process."""

    def __init__(self, taskset: str):
        self.env = SingleAgentEnv(SingleAgentEnvConfig(taskset={"id": taskset}, agent={
            "harness": {"id": "null"}, "runtime": {"type": "subprocess"}, "max_turns": MOST_TURNS}))
        self.tasks = list(self.env.taskset)
        self.seen = False  # the run's gateway, by any worker

    def problems(self) -> list[dict[str, str]]:
        """A problem of the run names a task by its place; nobody but verifiers judges it."""
        return [{"prompt": str(place), "answer": "by verifiers"} for place in range(len(self.tasks))]

    async def play(self, gateway: str, session: dict[str, Any]) -> float:
        """The reward of one episode. RuntimeError if verifiers could not play it."""
        variable = f"SESSION_{session['id']}"  # verifiers reads keys from the environment
        os.environ[variable] = session["api_key"]
        client = vf.EvalClientConfig(base_url=f"{gateway}/v1", api_key_var=variable)
        try:
            episode = await self.env.run_episode(self.tasks[int(session["task"]["text"])],
                                                 ModelContext(model="policy", client=client))
        finally:
            del os.environ[variable]
        if not episode.ok:
            errors = [*episode.errors, *(trace.last_error for trace in episode.traces if trace.has_error)]
            raise RuntimeError("; ".join(f"verifiers: {error.type}: {error.message}" for error in errors))
        return episode.traces[0].reward

    async def work(self, gateway: str, http: httpx.AsyncClient) -> None:
        """Sessions, one after another, until the gateway is gone."""
        begun = time.monotonic()
        while True:
            try:
                opened = await http.post(f"{gateway}/sessions")
            except httpx.TransportError:  # not there yet, or no longer
                if self.seen or time.monotonic() - begun > WAIT_FOR_RUN_S:
                    return
                await asyncio.sleep(1)
                continue
            opened.raise_for_status()
            self.seen = True
            if opened.status_code == 204:
                continue
            session = opened.json()
            where, ending = f"{gateway}/sessions/{session['id']}", {}
            try:
                reward = await self.play(gateway, session)
                (await http.post(f"{where}/reward", json={"reward": reward})).raise_for_status()
            except RuntimeError as error:
                ending = {"error": str(error)}
            await http.post(f"{where}/end", json=ending)

    async def serve(self, gateway: str, workers: int) -> None:
        key = {"Authorization": f"Bearer {os.environ['MEGATRON_RL_GATEWAY_KEY']}"}
        async with self.env.serving(), httpx.AsyncClient(headers=key, timeout=60.0) as http:
            await asyncio.gather(*(self.work(gateway, http) for _ in range(workers)))


if __name__ == "__main__":
    what, player = sys.argv[1], Player(sys.argv[2])
    if what == "problems":
        for row in player.problems():
            print(json.dumps(row))
    else:
        asyncio.run(player.serve(sys.argv[3].rstrip("/"), int(sys.argv[4]) if len(sys.argv) > 4 else 4))
