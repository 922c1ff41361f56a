"""Agents as programs and as functions: what they say becomes a response, and what goes wrong is theirs alone."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import aiohttp
import openai
import psutil
import pytest

from megatron_rl.config.agent import GATEWAY_KEY, AgentConfig
from megatron_rl.config.load import known_keys, load
from megatron_rl.config.orchestrator import RUN_KEY
from megatron_rl.config.rollout import ENGINE_KEY, EngineConfig, RolloutConfig
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.environment.agents import AgentPrograms, check_agent
from megatron_rl.observe.lease import START_NUMBER
from megatron_rl.orchestrator.serving import Serving, secret_variables
from megatron_rl.reward.user import score_of
from megatron_rl.rollout.collectors import SyncCollector
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.responses import Responder
from megatron_rl.types import Finish, Score
from tests.megatron_rl.environment.agents_of_tests import python_rewards
from tests.megatron_rl.environment.templates import CHATML, QWEN3, tokenizer_with
from tests.megatron_rl.environment.world import CONFIG, OWN_KEY, PROMPT, World, run, world
from tests.tiny_models import write_tiny_bailing

HERE = "tests.megatron_rl.environment.agents_of_tests"
SLEEP = "import time; time.sleep(600)"
"""What the program that hangs has started (agents_of_tests.py)."""
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class Judge:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def score(self, prompt, response_text: str) -> Score:
        self.asked.append(response_text)
        return Score(1.0, "correct")


def command(name: str, **options) -> AgentConfig:
    program = (sys.executable, str(Path(__file__).with_name("agents_of_tests.py")), name)
    return AgentConfig(**{"kind": "command", "command": program, "timeout_s": 40.0, **options})


def python(name: str, **options) -> AgentConfig:
    return AgentConfig(**{"kind": "python", "function": f"{HERE}.{name}", "timeout_s": 40.0, **options})


def says(read: str) -> str:
    return f"answer {read.count('<|im_start|>assistant')}"


class Agents:
    """A world with agents, a responder and a judge."""

    def __init__(self, it: World, agent: AgentConfig, correct_from: float | None = 1.0):
        self.judge = Judge()
        self.programs = AgentPrograms(
            replace(it.config, agent=agent), it.fleet, it.tokenizer, seed=0,
            secrets=secret_variables(Config(rollout=it.config)),
            verdict=partial(score_of, correct_from=correct_from))
        self.responder = Responder(it.fleet, it.config, it.tokenizer, self.judge, seed=0,
                                   eos_token_id=it.tokenizer.eos_token_id, agents=self.programs)

    async def respond(self, sample: int = 0):
        ticket = self.responder.tickets(PROMPT, step=0, index=0)[sample]
        return await self.responder.respond(ticket, self.responder.plan)


def respond(agent: AgentConfig, script=says, **options):
    """(the judged response, the world, the agents)"""
    async def story():
        async with world(script, **options) as it:
            agents = Agents(it, agent)
            try:
                return await agents.respond(), it, agents
            finally:
                await agents.programs.close()

    return run(story())


@pytest.mark.parametrize("agent", [command("talks"), python("python_talks")], ids=["command", "python"])
def test_a_conversation_becomes_one_response_whose_answers_are_trained_on(agent):
    judged, it, agents = respond(agent)
    rollout = judged.rollout
    assert it.text(rollout.token_ids) == (
        USER.format("Question?") + "answer 1<|im_end|>\n" + USER.format("Sure?") + "answer 2<|im_end|>")
    assert it.text(rollout.token_ids[rollout.trainable]) == "answer 1<|im_end|>answer 2<|im_end|>"
    last = it.engine.asked[-1]["input_ids"]
    assert rollout.token_ids.tolist()[:len(last)] == last, "what is trained on is what the engine read"
    assert (rollout.rollout_logprobs < 0).tolist() == rollout.trainable.tolist()
    assert rollout.finish is Finish.STOP and judged.score.status == "correct"
    assert agents.judge.asked == ["answer 2"], "the answer is judged, without what came before"
    assert agents.programs.take_metrics(0) == {"agent/sessions": 1, "agent/turns_mean": 2.0, "agent/turns_off_path": 0,
                                              "agent/misses": 0, "agent/unparsed_turns": 0}
    assert agents.programs.take_metrics(0) == {}


@pytest.mark.parametrize("sequences", ["concat", "individual"])
def test_individual_trains_every_turn_once_and_concat_the_last_path(sequences):
    """Four answers of 9 tokens: two to the first question's conversation on the last path, one before it, one apart."""
    judged, it, agents = respond(python("python_branches", sequences=sequences))
    trained = [it.text(each.token_ids[each.trainable]) for each in judged.rollout.sequences]
    last = "answer 1<|im_end|>answer 2<|im_end|>"
    assert trained == ([last] if sequences == "concat" else [last, "answer 1<|im_end|>", "answer 2<|im_end|>"])
    assert judged.rollout.response_tokens == 9 * (2 if sequences == "concat" else 4)
    read = [each["input_ids"] for each in it.engine.asked]
    assert len(read) == 4
    for each in judged.rollout.sequences:
        assert any(each.token_ids.tolist()[:-9] == asked for asked in read), "a sequence is what the engine read"
        assert (each.rollout_logprobs < 0).tolist() == each.trainable.tolist()
    assert agents.judge.asked == ["answer 2"], "there is one verdict"
    assert agents.programs.take_metrics(0)["agent/turns_off_path"] == (2 if sequences == "concat" else 0)


@pytest.mark.parametrize(("agent", "score"), [
    (command("rewards"), Score(0.25, "graded", correct=False)), (python("python_rewards"), Score(1.0, "correct"))],
    ids=["command", "python"])
def test_an_agents_own_reward_counts_as_a_reward_functions_does(agent, score):
    judged, _, agents = respond(agent)
    assert judged.score == score and agents.judge.asked == []


@pytest.mark.parametrize(("agent", "why", "turns"), [
    (command("crashes"), "it ended with exit code 1: .*RuntimeError: out of luck", 2),
    (command("hangs", timeout_s=20.0), "it did not end within rollout.agent.timeout_s=20", 2),
    (command("silent"), "it ended without a request that was answered", 0),
    (python("python_raises"), "KeyError: 'no such tool'", 2),
    (python("python_hangs", timeout_s=15.0), "no end within rollout.agent.timeout_s=15", 2),
    (python("python_returns_a_text"), "it returned 'good': reward must be a finite number, or None", 2),
], ids=["crashes", "hangs", "silent", "raises", "python_hangs", "returns_a_text"])
def test_an_agent_that_fails_fails_its_response_alone(agent, why, turns):
    judged, it, agents = respond(agent)
    assert judged.score.status == "environment_error" and judged.score.failed
    assert re.search(f"prompt 'p': {why}", judged.score.detail, re.DOTALL), judged.score.detail
    assert judged.rollout.finish is Finish.ERROR and agents.judge.asked == []
    assert judged.text.count("answer ") == turns, "what was sampled is kept to be looked at"


class Server:
    """An environment server: fetches sessions over HTTP and treats each as `serve` says, until it is cancelled."""

    def __init__(self, url: str, serve):
        self._url, self._serve, self.tasks = url, serve, []

    async def work(self) -> None:
        async with aiohttp.ClientSession(self._url, headers={"Authorization": f"Bearer {OWN_KEY}"}) as http:
            while True:
                async with http.post("/sessions", json={"wait_s": 20}) as answer:
                    if answer.status == 204:
                        continue
                    session = await answer.json()
                self.tasks.append(session["task"])
                async with openai.AsyncOpenAI(base_url=f"{self._url}/v1", api_key=session["api_key"]) as client:
                    reward = await python_rewards(client, session["task"])
                await self._serve(http, f"/sessions/{session['id']}", reward)


async def rewards_and_ends(http, where: str, reward: float) -> None:
    await http.post(f"{where}/reward", json={"reward": reward})
    await http.post(f"{where}/end")


async def gives_up(http, where: str, reward: float) -> None:
    await http.post(f"{where}/end", json={"error": "the sandbox is gone"})


async def forgets_to_end(http, where: str, reward: float) -> None:
    pass


def served(monkeypatch, servers: int, serve, timeout_s: float = 40.0):
    """(four responses of two prompts, the tasks that servers were given, the agents)"""
    monkeypatch.setenv(GATEWAY_KEY, OWN_KEY)

    async def story():
        async with world(says) as it:
            agents = Agents(it, AgentConfig(kind="http", port=choose_port(None), timeout_s=timeout_s))
            prompts = [PROMPT, replace(PROMPT, id="q", answer="another")]
            try:
                responses = asyncio.create_task(agents.responder.groups(prompts, step=0))
                while not agents.programs.gateway.is_open:
                    await asyncio.sleep(0.01)
                works = [Server(agents.programs.gateway.url, serve) for _ in range(servers)]
                working = asyncio.gather(*(server.work() for server in works))
                await asyncio.wait([responses, working], return_when=asyncio.FIRST_COMPLETED)
                if working.done():
                    working.result()  # raises what a server failed with
                groups = await responses
                working.cancel()
                await asyncio.wait([working])
            finally:
                await agents.programs.close()
            return groups, [task for server in works for task in server.tasks]

    return run(story())


def test_environment_servers_fetch_sessions_and_give_rewards(monkeypatch):
    groups, tasks = served(monkeypatch, 2, rewards_and_ends)
    assert sorted((task["id"], task["sample"]) for task in tasks) == [("p", 0), ("p", 1), ("q", 0), ("q", 1)]
    assert [[score.value for score in group.scores] for group in groups] == [[1.0, 1.0], [0.0, 0.0]]
    assert all(rollout.response_tokens == 18 for group in groups for rollout in group.rollouts)


@pytest.mark.parametrize(("servers", "serve", "timeout_s", "why"), [
    (1, gives_up, 40.0, "prompt 'p': the sandbox is gone"),
    (1, forgets_to_end, 10.0, "prompt 'p': it did not end within rollout.agent.timeout_s=10"),
    (0, gives_up, 3.0, "prompt 'p': no environment server fetched it within rollout.agent.timeout_s=3"),
], ids=["gives_up", "forgets", "none"])
def test_an_environment_server_that_fails_fails_its_responses(monkeypatch, servers, serve, timeout_s, why):
    groups, _ = served(monkeypatch, servers, serve, timeout_s=timeout_s)
    assert {score.status for group in groups for score in group.scores} == {"environment_error"}
    assert groups[0].scores[0].detail == f"rollout.agent, {why}"


def test_the_gateways_key_must_be_set_before_the_start(monkeypatch):
    monkeypatch.delenv(GATEWAY_KEY, raising=False)
    with pytest.raises(ValueError, match=f"rollout.agent.key_env={GATEWAY_KEY}: that environment variable is not set"):
        check_agent(AgentConfig(kind="http", port=8100), tokenizer_with(CHATML))


def with_words(words: str, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of the processes that have the words in their command line, and have not ended meanwhile."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_nothing_of_a_program_that_hangs_is_left_behind():
    this = psutil.Process()
    before, older = {each.pid for each in this.children(recursive=True)}, set(with_words(SLEEP, psutil.process_iter()))
    respond(command("hangs", timeout_s=6.0))
    wait_for(lambda: not [each for each in this.children(recursive=True) if each.pid not in before]
             and not set(with_words(SLEEP, psutil.process_iter())) - older)


def test_a_program_ends_with_the_orchestrator_that_is_killed():
    story = f"from {__name__} import command, respond\nrespond(command('hangs'))"
    orchestrator = subprocess.Popen([sys.executable, "-W", "ignore", "-c", story])
    try:
        asleep = wait_for(lambda: with_words(SLEEP, psutil.Process(orchestrator.pid).children(recursive=True)))[0]
        program = asleep.parent()
    finally:
        orchestrator.kill()
        orchestrator.wait()
    asleep.kill()  # what a program itself has started is its own business
    _, alive = psutil.wait_procs([program], timeout=60)
    assert not alive


def wait_for(found, seconds: float = 120.0):
    """What found() gives once there is any."""
    deadline = time.monotonic() + seconds
    while not (there := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return there


def test_an_engine_that_fails_is_no_fault_of_the_agent():
    def broken(read: str) -> str:
        raise RuntimeError("no answer")

    judged, *_ = respond(python("python_talks"), broken)
    assert judged.score.status == "engine_error" and "no response after 1 attempts" in judged.score.detail


def test_a_conversation_without_room_is_cut_and_judged():
    """The agent crashes on the refusal, which is how most take it; the response is one that was too long."""
    config = replace(CONFIG, max_response_tokens=120)
    judged, it, agents = respond(command("greedy"), config=config)
    assert judged.rollout.finish is Finish.LENGTH and not judged.score.failed and len(agents.judge.asked) == 1
    assert judged.rollout.tokens_after_prompt <= 120


def test_a_program_gets_no_key_of_the_run(monkeypatch):
    config = replace(CONFIG, engine=replace(CONFIG.engine, api_key_env="TEST_OWN_ENGINE_KEY"))
    for name in (RUN_KEY, ENGINE_KEY, GATEWAY_KEY, START_NUMBER, "MEGATRON_RL_OF_TOMORROW", "TEST_OWN_ENGINE_KEY"):
        monkeypatch.setenv(name, "a secret")
    monkeypatch.setenv("TEST_INHERITED", "no secret")
    _, it, _ = respond(command("secrets"), config=config)
    assert "user\nMEGATRON_RL_SESSION_URL,TEST_INHERITED<" in it.text(it.engine.asked[0]["input_ids"])


def test_every_variable_that_the_configuration_names_for_a_key_is_a_secret():
    keys = [key for key, _ in known_keys() if key.endswith("key_env")]
    config = load([*(f"{key}=SECRET_{place}" for place, key in enumerate(keys)),
                   "algo.distillation.teachers={a: {urls: [http://x], api_key_env: SECRET_OF_A}}"])
    assert len(keys) >= 4
    assert secret_variables(config) == {*(f"SECRET_{place}" for place in range(len(keys))), "SECRET_OF_A"}


def test_a_program_with_the_sdk_needs_nothing_but_its_environment():
    judged, it, _ = respond(command("sdk"))
    assert judged.score.status == "correct" and "answer 1" in judged.text


def test_as_many_agents_run_at_once_as_configured():
    async def story():
        async with world(says, latency_s=0.2) as it:
            agents = Agents(it, python("python_talks", concurrency=2))
            most, real, two = [0, 0], it.fleet.generate, asyncio.Event()

            async def counted(*args, **options):
                most[0] += 1
                most[1] = max(most)
                if most[0] == 2:
                    two.set()
                await two.wait()
                try:
                    return await real(*args, **options)
                finally:
                    most[0] -= 1

            it.fleet.generate = counted
            try:
                await asyncio.gather(*(agents.respond(sample % 2) for sample in range(6)))
            finally:
                await agents.programs.close()
            assert most[1] == 2 and len(it.engine.asked) == 12

    run(story())


def test_a_step_of_agents_balances_its_account_to_the_token():
    """Six responses; every sampled token is returned, since no turn lies off a path."""
    class Three:
        def next(self, n: int):
            return [replace(PROMPT, id=f"p{number}") for number in range(n)]

    async def story():
        async with world(says, config=replace(CONFIG, prompts_per_step=3)) as it:
            agents = Agents(it, python("python_talks"))
            try:
                groups, ledger = await SyncCollector(agents.responder, Three(), prompts_per_step=3).collect(0, 0)
            finally:
                await agents.programs.close()
            assert [len(group.rollouts) for group in groups] == [2, 2, 2]
            assert ledger.generated_tokens == ledger.returned_tokens == 6 * 2 * 9 and ledger.dropped_tokens == 0

    run(story())


def test_a_response_that_is_given_up_ends_its_agent():
    async def story():
        async with world(says, latency_s=20.0) as it:
            agents = Agents(it, command("talks"))
            task = asyncio.create_task(agents.respond())
            while not it.engine.asked:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert it.engine.aborted == [it.engine.asked[0]["rid"]]
            assert not with_words("agents_of_tests.py", psutil.Process().children())
            await agents.programs.close()

    run(story())


@pytest.mark.parametrize(("options", "why"), [
    ({"kind": "command", "command": ("no-such-program-here",)}, "no program no-such-program-here is on PATH"),
    ({"kind": "python", "function": "nowhere.agent"}, "rollout.agent.function=nowhere.agent: cannot import nowhere"),
    ({"kind": "python", "function": f"{HERE}.python_is_not_async"}, "must be an async function"),
])
def test_an_agent_that_is_not_there_is_named_before_the_start(options, why):
    with pytest.raises(ValueError, match=why):
        check_agent(AgentConfig(**options), tokenizer_with(CHATML))


def test_a_template_that_does_not_fit_is_named_before_the_start():
    check_agent(command("talks", history="keep_thinking"), tokenizer_with(QWEN3))
    with pytest.raises(ValueError, match="rollout.agent.history=append: the chat template is not append-only"):
        check_agent(command("talks"), tokenizer_with(QWEN3))
    check_agent(AgentConfig(), tokenizer_with(None))  # without an agent nothing is needed


@pytest.mark.parametrize(("options", "why"), [
    ({"kind": "command"}, "rollout.agent.kind=command needs rollout.agent.command"),
    ({"kind": "python", "command": ("a",), "function": "a.b"}, "rollout.agent.command is read with"),
    ({"function": "a.b"}, "rollout.agent.function is read with rollout.agent.kind=python, and that is None"),
    ({"kind": "http"}, "rollout.agent.kind=http needs rollout.agent.port"),
    ({"kind": "http", "port": 8100, "key_env": ""}, "rollout.agent.key_env is empty"),
    ({"sequences": "individual"}, "rollout.agent.sequences=individual is read with a rollout.agent.kind"),
    ({"concurrency": 0}, "rollout.agent.concurrency=0 must be at least 1"),
    ({"timeout_s": 0}, "rollout.agent.timeout_s=0 must be positive"),
    ({"port": 70000}, "rollout.agent.port=70000"),
])
def test_settings_that_cannot_be_meant_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        AgentConfig(**options)


def test_what_an_agent_cannot_be_combined_with_is_named():
    with pytest.raises(ValueError, match="rollout.environment=a.b with rollout.agent.kind=command"):
        RolloutConfig(agent=command("talks"), environment="a.b")


def test_a_runs_responders_speak_through_one_gateway_that_closes_with_its_engines(tmp_path):
    """Training and evaluation share it (orchestrator/serving.py)."""
    async def story():
        async with world(says) as it:
            rollout = replace(it.config, agent=python("python_talks"), engine=EngineConfig(urls=(it.engine.url,)))
            config = Config(rollout=rollout, model=ModelConfig(path=str(write_tiny_bailing(tmp_path / "model"))))
            async with Serving(config) as serving:
                assert serving.agent_metrics(0) == {}
                training, evaluation = (serving.responder(config, it.tokenizer, Judge()) for _ in range(2))
                groups = await training.groups([PROMPT], step=4)
                plan = replace(evaluation.plan, samples_per_prompt=1, temperature=0.5)
                groups += await evaluation.groups([PROMPT], step=0, tag="eval", plan=plan)
                assert [len(group.rollouts) for group in groups] == [2, 1]
                assert it.engine.asked[-1]["sampling_params"]["temperature"] == 0.5
                assert serving.agent_metrics(3) == {}, "what was sampled ahead is told with its own step"
                assert serving.agent_metrics(4)["agent/sessions"] == 2, "evaluation trains nothing"
                url = serving._agents.gateway.url
            with pytest.raises(aiohttp.ClientConnectorError):
                async with aiohttp.ClientSession() as http:
                    await http.get(f"{url}/v1/models")

    run(story())
