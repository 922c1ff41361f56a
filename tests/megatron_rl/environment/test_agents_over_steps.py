"""Agents under rollout.collector=partial: a turn that a step interrupts goes on in the next, inside one request."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace

import pytest

from megatron_rl.config.agent import AgentConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.rollout.collectors import PartialAgentsCollector
from megatron_rl.types import Prompt
from tests.megatron_rl.environment import agents_of_tests
from tests.megatron_rl.environment.test_agents import Agents, command, python
from tests.megatron_rl.environment.world import CONFIG, PROMPT, World, run, world

OPENS = "<|im_start|>assistant\n"
TURN = 25
"""Tokens of a turn, with its end."""
SLICE, BUDGET = 4, 30


def goes_on(read: str) -> str:
    """What is left of an answer of 24 characters, whatever of it has been read."""
    *earlier, so_far = read.split(OPENS)
    return f"answer {len(earlier)}, from {len(earlier)}0 to {len(earlier)}9."[len(so_far):]


class Counting:
    """p0, p1, p2 ..., one after another."""

    def __init__(self) -> None:
        self.drawn = 0

    def next(self, n: int) -> list[Prompt]:
        self.drawn += n
        return [replace(PROMPT, id=f"p{number}") for number in range(self.drawn - n, self.drawn)]

    def state_dict(self) -> dict:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict) -> None:
        self.drawn = state["drawn"]


def collector_of(agents: Agents, **changes) -> PartialAgentsCollector:
    return PartialAgentsCollector(agents.responder, Counting(), **{
        "prompts_per_step": 1, "budget_tokens": BUDGET, "slice_tokens": SLICE, "retention_steps": 50, "concurrency": 16,
        **changes})


def over_steps(agent: AgentConfig, story, **options):
    """What story(world, agents) gives."""
    async def whole():
        async with world(goes_on, **options) as it:
            agents = Agents(it, agent)
            try:
                return await story(it, agents)
            finally:
                await agents.programs.close()

    return run(whole())


async def publish(it: World, version: int) -> None:
    it.fleet.updating(version, [it.engine.url])
    it.engine.label = version
    it.fleet.published(version, [it.engine.url], {})


@pytest.mark.parametrize("agent", [command("talks"), python("python_talks")], ids=["command", "python"])
def test_a_turn_that_a_step_interrupts_goes_on_in_the_next_inside_its_request(agent):
    """Two responses of two turns need 100 tokens; a step samples 30, to the token, and each has newer weights."""
    async def story(it: World, agents: Agents):
        collector, account, groups, carried = collector_of(agents), [], [], 0
        for step in range(4):
            await publish(it, step)
            asked = len(it.engine.asked)
            found, ledger = await collector.collect(step, 0)
            account.append(ledger.generated_tokens)
            assert all(body["sampling_params"]["max_new_tokens"] <= SLICE for body in it.engine.asked[asked:])
            assert carried + ledger.generated_tokens == ledger.returned_tokens + ledger.carried_tokens
            groups, carried = groups + found, ledger.carried_tokens
        assert account == [BUDGET] * 4, "the budget is spent to the token"
        [group] = groups
        assert group.prompt.id == "p0" and [score.status for score in group.scores] == ["correct"] * 2
        for rollout in group.rollouts:
            said = it.text(rollout.token_ids[rollout.trainable])
            assert said == "answer 1, from 10 to 19.<|im_end|>answer 2, from 20 to 29.<|im_end|>"
            versions = [span.version for span in rollout.weight_versions]
            assert len(set(versions)) > 1 and versions == sorted(versions)
            assert sum(span.end - span.start for span in rollout.weight_versions) == 2 * TURN
        neighbours = [pair for rollout in group.rollouts for pair in itertools.pairwise(rollout.weight_versions)]
        assert any(first.end == second.start for first, second in neighbours), "one turn, two versions"
        assert all(len(session.tree.turns) == session.requests == 2 and session.tree.misses == 0
                   for session in agents.programs._ended), "each turn was one request of the agent's"
        assert len(it.engine.asked) > 2 * len(agents.programs._ended) * 3, "and several of the engine's"

    over_steps(agent, story)


def test_waiting_for_the_next_step_is_not_the_agents_time_and_holds_up_no_evaluation():
    """timeout_s is 8 s, and the second step comes after 9; evaluation's agents run in between, at concurrency 2."""
    async def story(it: World, agents: Agents):
        collector = collector_of(agents)
        await collector.collect(0, 0)
        began = time.monotonic()
        plan = replace(agents.responder.plan, samples_per_prompt=1)
        [evaluated] = await agents.responder.groups([PROMPT], step=0, tag="eval", plan=plan)
        assert evaluated.rollouts[0].response_tokens == 2 * TURN
        await asyncio.sleep(max(0.0, 9.0 - (time.monotonic() - began)))
        groups = []
        for step in range(1, 4):
            groups += (await collector.collect(step, 0))[0]
        assert [score.detail for score in groups[0].scores] == ["", ""]

    over_steps(python("python_talks", timeout_s=8.0, concurrency=2), story)


def test_an_agent_that_hangs_by_itself_still_runs_out_of_time():
    async def story(it: World, agents: Agents):
        collector = collector_of(agents, budget_tokens=4 * TURN + 1)
        groups, ledger = await collector.collect(0, 0)
        assert [score.status for score in groups[0].scores] == ["environment_error"] * 2
        assert "within rollout.agent.timeout_s=2" in groups[0].scores[0].detail

    over_steps(python("python_hangs", timeout_s=2.0), story)


def test_groups_that_are_too_old_are_dropped_with_their_agents():
    async def story(it: World, agents: Agents):
        collector = collector_of(agents, retention_steps=1, budget_tokens=6)
        for step in range(2):
            groups, ledger = await collector.collect(step, 0)
            assert (groups, ledger.carried_tokens, ledger.dropped_tokens) == ([], 6 * (step + 1), 0)
        _, ledger = await collector.collect(2, 0)
        assert (ledger.dropped_responses, ledger.dropped_tokens, ledger.carried_tokens) == (2, 12, 6)
        assert len(agents.programs.gateway._sessions) == 2, "the keys of those that were dropped open nothing"

    over_steps(python("python_talks"), story)


def test_a_resumed_collector_starts_the_agents_of_open_groups_again():
    async def story(it: World, agents: Agents):
        first = collector_of(agents)
        await first.collect(0, 0)
        state = first.state_dict()
        resumed, groups = collector_of(agents), []
        resumed.load_state_dict(state)
        for step in range(1, 5):
            found, ledger = await resumed.collect(step, 0)
            assert ledger.generated_tokens == BUDGET and ledger.dropped_tokens == 0
            groups += found
        assert groups[0].prompt.id == "p0"
        assert [rollout.response_tokens for rollout in groups[0].rollouts] == [2 * TURN] * 2

    over_steps(python("python_talks"), story)


def test_a_stop_text_is_refused_since_a_slice_could_cut_it_in_two(monkeypatch):
    """And agents that all fail end the round, although they spend nothing of its budget."""
    async def asks_with_stop(client, task) -> None:
        await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "Hi"}], stop=["ab"])

    monkeypatch.setattr(agents_of_tests, "python_talks", asks_with_stop)

    async def story(it: World, agents: Agents):
        [group], ledger = await collector_of(agents).collect(0, 0)
        assert ledger.generated_tokens == 0 and not it.engine.asked
        assert all("stop=['ab'] with rollout.collector=partial" in score.detail for score in group.scores)

    over_steps(python("python_talks"), story)


def test_environment_servers_do_not_go_with_it():
    with pytest.raises(ValueError, match="rollout.agent.kind=http with rollout.collector=partial"):
        RolloutConfig(agent=AgentConfig(kind="http", port=8100), collector="partial")
    assert CONFIG.collector == "sync"
