"""An environment server for rollout.agent.kind=http: it fetches sessions from the run and holds the conversations.

    MEGATRON_RL_GATEWAY_KEY=... python server.py http://127.0.0.1:8100 [workers]

It may run on another machine and in another virtual environment, for it needs the OpenAI SDK and nothing of this
project. It ends when the run does.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from agent import solve

WAIT_FOR_RUN_S = 600.0


def post(url: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """The answer to a request with the gateway's key; None if it is empty."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {
        "Authorization": f"Bearer {os.environ['MEGATRON_RL_GATEWAY_KEY']}", "Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer) if answer.status == 200 else None


def work(gateway: str, seen: threading.Event) -> None:
    """Sessions, one after another, until the gateway is gone. seen: set once any worker has met it."""
    begun = time.monotonic()
    while True:
        try:
            session = post(f"{gateway}/sessions", {})
        except urllib.error.HTTPError:
            raise
        except OSError:  # not there yet, or no longer
            if seen.is_set() or time.monotonic() - begun > WAIT_FOR_RUN_S:
                return
            time.sleep(1)
            continue
        seen.set()
        if session is None:
            continue
        ending: dict[str, Any] = {}
        try:
            answer = solve(openai.OpenAI(base_url=f"{gateway}/v1", api_key=session["api_key"]), session["task"]["text"])
            right = f"\\boxed{{{session['task']['answer']}}}" in answer
            post(f"{gateway}/sessions/{session['id']}/reward", {"reward": float(right)})
        except openai.OpenAIError as error:
            ending = {"error": str(error)}
        post(f"{gateway}/sessions/{session['id']}/end", ending)


if __name__ == "__main__":
    workers, met = int(sys.argv[2]) if len(sys.argv) > 2 else 8, threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        for each in [pool.submit(work, sys.argv[1].rstrip("/"), met) for _ in range(workers)]:
            each.result()
