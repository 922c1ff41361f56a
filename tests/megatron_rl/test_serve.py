"""`megatron-rl serve`: conversations with a checkpoint, kept as problems."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp
import anthropic
import openai
import pytest

from megatron_rl.config.agent import GATEWAY_KEY
from megatron_rl.config.reward import JudgeConfig, RewardConfig
from megatron_rl.config.rollout import EngineConfig
from megatron_rl.config.schema import Config, DataConfig, ModelConfig, RunConfig
from megatron_rl.data import Limits, build_prompts
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.recipes.serve import CONVERSATIONS, serve
from megatron_rl.reward import RewardPool
from tests.megatron_rl.environment.templates import CHATML, tokenizer_with
from tests.megatron_rl.environment.world import PROMPT, run, world
from tests.tiny_models import bailing_config, tiny_bailing_weights

ROOT = Path(__file__).resolve().parents[2]
HI = {"role": "user", "content": "Hi"}


def says(read: str) -> str:
    return f"answer {read.count('<|im_start|>assistant')}"


def write_model(tmp_path: Path) -> Path:
    tokenizer_with(CHATML).save_pretrained(tmp_path / "tokenizer")
    config = bailing_config(vocab_size=128)
    return write_hf_folder(tmp_path / "model", config, tiny_bailing_weights(config).items(),
                           tokenizer_from=tmp_path / "tokenizer")


def served(tmp_path: Path, use, data: DataConfig | None = None, script=says) -> list[dict]:
    """The conversations that were written down. use(gateway, key, session): a coroutine that talks."""
    write_model(tmp_path)

    async def story() -> None:
        async with world(script) as it:
            rollout = replace(it.config, engine=EngineConfig(urls=(it.engine.url,)))
            whole = Config(rollout=rollout, data=data or DataConfig(), model=ModelConfig(path=str(tmp_path / "model")),
                           run=RunConfig(dir=str(tmp_path)))
            stop, talking = asyncio.Event(), []

            def tell(gateway, key, session) -> None:
                talking.append(asyncio.create_task(use(gateway, key, session)))
                talking[0].add_done_callback(lambda _: stop.set())

            await serve(whole, tell, stop)
            await talking[0]

    run(story())
    path = tmp_path / CONVERSATIONS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_conversation_is_kept_whole_when_serving_ends(tmp_path):
    async def use(gateway, key, session) -> None:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=session.key) as client:
            first = (await client.chat.completions.create(model="policy", messages=[HI])).choices[0].message
            more = [HI, first, {"role": "user", "content": "Sure?"}]
            await client.chat.completions.create(model="policy", messages=more)
            await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "Another"}])

    two, one = served(tmp_path, use)
    assert [(each["role"], each["content"]) for each in two["messages"]] == [
        ("user", "Hi"), ("assistant", "answer 1"), ("user", "Sure?"), ("assistant", "answer 2")]
    assert (two["prompt"], one["prompt"], two["reward"]) == ("Hi", "Another", None)


def test_it_serves_a_judge_of_responses(tmp_path, monkeypatch):
    """reward.routes.<domain>=llm_judge with the base URL and the key that serve prints."""
    (tmp_path / "rubric.txt").write_text("Is {response} right for {question}?")
    scores = []

    async def use(gateway, key, session) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", session.key)
        judge = JudgeConfig(f"{gateway.url}/v1", rubric=str(tmp_path / "rubric.txt"), key_env="OPENAI_API_KEY")
        with RewardPool(RewardConfig(routes={"math": "llm_judge"}, judge=judge)) as pool:
            scores.extend([await pool.score(PROMPT, text) for text in ("41", "42")])

    served(tmp_path, use, script=lambda read: json.dumps({"why": "so", "score": int("Is 42" in read)}))
    assert [(score.value, score.status) for score in scores] == [(0.0, "wrong"), (1.0, "correct")]


def test_the_command_prints_what_an_sdk_needs_and_ends_by_ctrl_c(tmp_path):
    """The command as a process, in front of an engine that runs already."""
    write_model(tmp_path)
    words = [sys.executable, "-m", "megatron_rl.cli", "serve", f"model.path={tmp_path / 'model'}",
             f"run.dir={tmp_path / 'run'}"]

    async def story() -> None:
        async with world(says) as it:
            process = await asyncio.create_subprocess_exec(
                *words, f"rollout.engine.urls=[{it.engine.url}]", stdout=asyncio.subprocess.PIPE, cwd=ROOT)
            told: dict[str, str] = {}
            while "MEGATRON_RL_GATEWAY_KEY" not in told:
                line = (await process.stdout.readline()).decode()
                assert line, "it ended early"
                told |= dict(word.split("=", 1) for word in line.split()[1:] if line.startswith("export "))
            async with openai.AsyncOpenAI(base_url=told["OPENAI_BASE_URL"], api_key=told["OPENAI_API_KEY"]) as client:
                await client.chat.completions.create(model="policy", messages=[HI])
            async with anthropic.AsyncAnthropic(base_url=told["ANTHROPIC_BASE_URL"],
                                                api_key=told["ANTHROPIC_API_KEY"]) as client:
                await client.messages.create(model="policy", max_tokens=9, messages=[HI])
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0

    run(story())
    kept = [json.loads(line) for line in (tmp_path / "run" / CONVERSATIONS).read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in kept] == ["answer 1"] * 2


def test_sessions_get_the_problems_of_data_and_what_is_kept_is_a_file_of_problems(tmp_path, monkeypatch):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": text, "answer": answer}) + "\n"
                                for text, answer in (("1+1", "2"), ("2+2", "4"))))
    monkeypatch.setenv(GATEWAY_KEY, "the key of an environment server")
    tasks = []

    async def use(gateway, key, session) -> None:
        assert key == "the key of an environment server"
        async with aiohttp.ClientSession(gateway.url, headers={"Authorization": f"Bearer {key}"}) as http:
            async with http.post("/sessions", json={"prompt_id": "p"}) as answer:
                assert answer.status == 400 and "prompt_id: not read here" in await answer.text()
            for _ in range(3):
                async with http.post("/sessions") as answer:
                    opened = await answer.json()
                tasks.append(opened["task"])
                async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=opened["api_key"]) as client:
                    await client.chat.completions.create(model="policy", messages=[HI])
                await http.post(f"/sessions/{opened['id']}/reward", json={"reward": 0.5})
                await http.post(f"/sessions/{opened['id']}/end")

    kept = served(tmp_path, use, DataConfig(path=str(problems), shuffle=False))
    assert [task["text"] for task in tasks] == ["1+1", "2+2", "1+1"]
    assert [(row["prompt"], row["answer"], row["reward"]) for row in kept] == [
        ("1+1", "2", 0.5), ("2+2", "4", 0.5), ("1+1", "2", 0.5)]
    again = DataConfig(path=str(tmp_path / CONVERSATIONS), id_key="id")
    source = build_prompts(again, tokenizer_with(CHATML), Limits())
    assert [source.prompt(place).answer for place in range(len(source))] == ["2", "4", "2"]


def test_an_engine_that_failed_once_does_not_end_the_session(tmp_path):
    async def use(gateway, key, session) -> None:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=session.key, max_retries=0) as client:
            failing, real = True, session.model.fleet.generate

            async def generate(*args, **options):
                from megatron_rl.rollout.fleet import FleetError
                if failing:
                    raise FleetError("no engine")
                return await real(*args, **options)

            session.model.fleet.generate = generate
            with pytest.raises(openai.InternalServerError, match="no engine"):
                await client.chat.completions.create(model="policy", messages=[HI])
            failing = False
            await client.chat.completions.create(model="policy", messages=[HI])

    [kept] = served(tmp_path, use)
    assert kept["messages"][-1]["content"] == "answer 1"
