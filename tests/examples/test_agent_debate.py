"""The debate as a run starts it: one session holds two conversations, and each hears the other."""

from __future__ import annotations

from dataclasses import replace

from examples.agent_calculator.learn import write_tokenizer
from examples.agent_debate.debate import lessons, opening, problems, rendered, reply
from megatron_rl.config.agent import AgentConfig
from megatron_rl.types import Prompt
from tests.megatron_rl.environment.test_agents import Agents
from tests.megatron_rl.environment.world import run, world

PROMPT = Prompt("word", (1,), "abcd backwards", "dcba", "math")
AGENT = AgentConfig(kind="python", function="examples.agent_debate.debate.debate", sequences="individual",
                    timeout_s=240.0)


def follows(read: str) -> str:
    """A is right and B is not; then each says what it has heard."""
    *_, heard = read.split("The other says ")
    return heard[:4] if heard != read else "dcba" if "user\nA:" in read else "dddd"


def test_each_side_hears_the_other_and_all_four_answers_train():
    async def story():
        async with world(follows) as it:
            agents = Agents(it, AGENT)
            try:
                ticket = replace(agents.responder.tickets(PROMPT, step=0, index=0)[0], prompt=PROMPT)
                judged = await agents.responder.respond(ticket, agents.responder.plan)
            finally:
                await agents.programs.close()
            assert (judged.score.value, judged.score.status) == (0.5, "graded"), "one of two last answers is right"
            said = sorted(it.text(each.token_ids[each.trainable]) for each in judged.rollout.sequences)
            assert said == ["dcba<|im_end|>dddd<|im_end|>", "dddd<|im_end|>dcba<|im_end|>"]
            assert agents.programs.take_metrics(0)["agent/turns_off_path"] == 0

    run(story())


def test_lessons_are_written_as_the_debate_will_be_read(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    first, second = list(lessons(tokenizer, 0))[:2]
    word, right = next(problems(1000))
    speech = next(opening(name, word) for name in "AB" if rendered(tokenizer, opening(name, word)) == first["prompt"])
    heard = second["prompt"].split("The other says ")[1].split(".")[0]
    assert second["prompt"] == rendered(
        tokenizer, [*speech, {"role": "assistant", "content": first["response"]}, reply(heard)])
    assert second["response"] in (right, heard) and right == word.split()[0][::-1]
