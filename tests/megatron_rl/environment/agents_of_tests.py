"""Agents: `python agents_of_tests.py NAME` is a program of kind command, async functions are of kind python."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {
        "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.load(answer)


def ask(messages: list[dict], **more) -> dict:
    body = {"messages": messages, **more}
    return post(f"{os.environ['OPENAI_BASE_URL']}/chat/completions", body)["choices"][0]["message"]


def two_turns() -> list[dict]:
    task = json.loads(sys.stdin.readline())
    messages = [{"role": "user", "content": task["text"]}]
    messages += [ask(messages), {"role": "user", "content": "Sure?"}]
    return [*messages, ask(messages)]


def reward(value: float) -> None:
    post(os.environ["MEGATRON_RL_SESSION_URL"] + "/reward", {"reward": value})


def talks() -> None:
    two_turns()


def rewards() -> None:
    task = json.loads(sys.stdin.readline())
    ask([{"role": "user", "content": task["text"]}])
    reward(0.25)


def branches() -> None:
    """What python_branches does, in short answers; the reward depends on the last one."""
    task = json.loads(sys.stdin.readline())
    messages = [{"role": "user", "content": task["text"]}]
    first = ask(messages, max_tokens=6)
    ask([{"role": "user", "content": "Helper?"}], max_tokens=6)
    for doubt in ("Sure?", "Really?"):
        last = ask([*messages, first, {"role": "user", "content": doubt}], max_tokens=6)
    reward(float(len(set(last["content"])) > 4))


def crashes() -> None:
    two_turns()
    raise RuntimeError("out of luck")


def hangs() -> None:
    two_turns()
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(600)


def silent() -> None:
    pass


def greedy() -> None:
    """Asks until it is refused, and crashes on that."""
    messages = [{"role": "user", "content": "Go"}]
    while True:
        messages += [ask(messages), {"role": "user", "content": "On"}]


def secrets() -> None:
    names = sorted(name for name in os.environ if name.startswith(("MEGATRON_RL", "TEST_")))
    ask([{"role": "user", "content": ",".join(names)}])


def sdk() -> None:
    import openai

    answer = openai.OpenAI().chat.completions.create(model="policy", messages=[{"role": "user", "content": "Hi"}])
    print(answer.choices[0].message.content)


async def python_talks(client, task) -> None:
    messages = [{"role": "user", "content": task["text"]}]
    first = await client.chat.completions.create(model="policy", messages=messages)
    messages += [first.choices[0].message, {"role": "user", "content": "Sure?"}]
    await client.chat.completions.create(model="policy", messages=messages)


async def python_branches(client, task) -> None:
    """Two answers to one question, and a conversation of its own in between, all with the last answer's reward."""
    messages = [{"role": "user", "content": task["text"]}]
    first = await client.chat.completions.create(model="policy", messages=messages)
    await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "Helper?"}])
    for doubt in ("Sure?", "Really?"):
        more = [*messages, first.choices[0].message, {"role": "user", "content": doubt}]
        await client.chat.completions.create(model="policy", messages=more)


async def python_rewards(client, task) -> float:
    await python_talks(client, task)
    return 1.0 if task["answer"] == "42" else 0.0


async def python_raises(client, task) -> None:
    await python_talks(client, task)
    raise KeyError("no such tool")


async def python_hangs(client, task) -> None:
    await python_talks(client, task)
    await asyncio.sleep(600)


async def python_returns_a_text(client, task) -> str:
    await python_talks(client, task)
    return "good"


def python_is_not_async(client, task) -> None:
    pass


if __name__ == "__main__":
    globals()[sys.argv[1]]()
