"""Calls and reasoning, parsed by SGLang's own parsers in their process. Ids stay whatever they find."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import anthropic
import openai
import pytest

from megatron_rl.environment.gateway.parsing import Parsed, Parser
from tests.megatron_rl.environment.templates import QWEN3
from tests.megatron_rl.environment.world import world

TOOL = {"type": "function", "function": {"name": "weather", "description": "of a place", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}}}}}
CALL = '<tool_call>\n{{"name": "weather", "arguments": {{"place": "{}"}}}}\n</tool_call>'
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def parsing():
    """(what runs coroutines in the loop that the parsing process belongs to, the parser): it is slow to start."""
    with asyncio.Runner() as runner:
        parser = Parser("qwen25", "qwen3")
        runner.run(parser.start())
        yield runner, parser
        runner.run(parser.close())


@pytest.mark.parametrize(("text", "opened", "parsed"), [
    ("just text", False, Parsed("just text")),
    ("<think>\nhm\n</think>\n\n" + CALL.format("Rome"), False,
     Parsed("", "hm", (("weather", '{"place": "Rome"}'),))),
    ("hm\n</think>\n\nyes", True, Parsed("yes", "hm")),
    ("Both: " + CALL.format("Rome") + "\n" + CALL.format("Oslo"), False,
     Parsed("Both:", "", (("weather", '{"place": "Rome"}'), ("weather", '{"place": "Oslo"}')))),
], ids=["text", "thinking_and_call", "opened", "parallel"])
def test_sglangs_parsers_answer(parsing, text, opened, parsed):
    runner, parser = parsing
    found = runner.run(parser.parse(text, [TOOL], opened=opened))
    assert (found.reasoning.strip(), found.content.strip()) == (parsed.reasoning, parsed.content)
    assert [(name, json.loads(arguments)) for name, arguments in found.calls] == [
        (name, json.loads(arguments)) for name, arguments in parsed.calls]
    assert found.error is None


def test_a_text_that_cannot_be_parsed_is_told_whole(parsing):
    runner, parser = parsing
    for text in ("<tool_call>\n{broken\n</tool_call>", "<tool_call>\n" + "x" * 100_000, "<tool_call>"):
        found = runner.run(parser.parse(text, [TOOL], opened=False))
        assert found.calls == () and isinstance(found.content, str)


def test_a_parsing_process_that_dies_is_started_again(parsing):
    runner, parser = parsing

    async def story():
        parser._process.kill()
        await parser._process.wait()
        return await parser.parse(CALL.format("Rome"), [TOOL], opened=False)

    assert runner.run(story()).calls == (("weather", '{"place": "Rome"}'),)


def test_requests_that_are_given_up_leave_no_answer_to_the_next(parsing):
    runner, parser = parsing

    async def story():
        given_up = asyncio.create_task(parser.parse("mine" * 1000, [TOOL], opened=False))
        await asyncio.sleep(0)
        given_up.cancel()
        return await asyncio.gather(*(parser.parse(f"text {number}", [], opened=False) for number in range(20)))

    assert [each.content for each in runner.run(story())] == [f"text {number}" for number in range(20)]


def both_places(read: str) -> str:
    if "<tool_response>" in read:
        return "Sun and snow."
    return "<think>\nlook\n</think>\n\n" + CALL.format("Rome") + "\n" + CALL.format("Oslo")


def test_parallel_calls_go_round_over_openai(parsing):
    runner, parser = parsing

    async def story():
        async with world(both_places, template=QWEN3, history="keep_thinking", parser=parser) as it:
            session = it.session()
            client = openai.AsyncOpenAI(base_url=f"{it.gateway.url}/v1", api_key=session.key, max_retries=0)
            first = (await client.chat.completions.create(model="policy", messages=HI, tools=[TOOL])).choices[0]
            assert first.finish_reason == "tool_calls"
            calls = first.message.tool_calls
            assert [json.loads(call.function.arguments)["place"] for call in calls] == ["Rome", "Oslo"]
            results = [{"role": "tool", "tool_call_id": call.id, "content": text}
                       for call, text in zip(calls, ("sunny", "snowy"), strict=True)]
            last = (await client.chat.completions.create(
                model="policy", messages=[*HI, first.message, *results], tools=[TOOL])).choices[0]
            assert (last.message.content, last.finish_reason) == ("Sun and snow.", "stop")
            assert session.tree.turns[1].parent is session.tree.turns[0] and session.tree.misses == 0
            read = it.text(it.engine.asked[1]["input_ids"])
            assert both_places("") + "<|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n" in read
            assert len(read.split("snowy")) == 2
            chunks = [chunk async for chunk in await client.chat.completions.create(
                model="policy", messages=HI, tools=[TOOL], stream=True)]
            deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            assert [(delta.index, json.loads(delta.function.arguments)["place"]) for delta in deltas] == [
                (0, "Rome"), (1, "Oslo")]
            assert chunks[-1].choices[0].finish_reason == "tool_calls"

    runner.run(story())


def test_parallel_calls_go_round_over_anthropic(parsing):
    runner, parser = parsing
    tool = {"name": "weather", "description": "of a place", "input_schema": TOOL["function"]["parameters"]}

    async def story():
        async with world(both_places, template=QWEN3, history="keep_thinking", parser=parser) as it:
            session = it.session()
            claude = anthropic.AsyncAnthropic(base_url=it.gateway.url, api_key=session.key, max_retries=0)
            async with claude.messages.stream(model="policy", max_tokens=500, messages=HI, tools=[tool]) as events:
                first = await events.get_final_message()
            assert [block.type for block in first.content] == ["thinking", "tool_use", "tool_use"]
            assert first.stop_reason == "tool_use" and first.content[2].input == {"place": "Oslo"}
            results = [{"type": "tool_result", "tool_use_id": block.id, "content": text}
                       for block, text in zip(first.content[1:], ("sunny", "snowy"), strict=True)]
            last = await claude.messages.create(model="policy", max_tokens=500, tools=[tool], messages=[
                *HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}])
            assert (last.content[0].text, last.stop_reason) == ("Sun and snow.", "end_turn")
            assert session.tree.turns[1].parent is session.tree.turns[0] and session.tree.misses == 0

    runner.run(story())


def test_parallel_calls_go_round_over_responses(parsing):
    runner, parser = parsing
    tool = {"type": "function", "name": "weather", "parameters": TOOL["function"]["parameters"], "strict": None}

    async def story():
        async with world(both_places, template=QWEN3, history="keep_thinking", parser=parser) as it:
            session = it.session()
            client = openai.AsyncOpenAI(base_url=f"{it.gateway.url}/v1", api_key=session.key, max_retries=0)
            async with client.responses.stream(model="policy", input=HI, tools=[tool]) as events:
                kinds = [event.type async for event in events]
                first = await events.get_final_response()
            assert kinds.count("response.function_call_arguments.done") == 2 and kinds[-1] == "response.completed"
            assert [item.type for item in first.output] == ["reasoning", "function_call", "function_call"]
            calls = first.output[1:]
            assert [json.loads(call.arguments)["place"] for call in calls] == ["Rome", "Oslo"]
            results = [{"type": "function_call_output", "call_id": call.call_id, "output": text}
                       for call, text in zip(calls, ("sunny", "snowy"), strict=True)]
            sent_back = [item.model_dump(exclude={"parsed_arguments"}) for item in first.output]
            last = await client.responses.create(model="policy", input=[*HI, *sent_back, *results], tools=[tool])
            assert (last.output_text, last.status) == ("Sun and snow.", "completed")
            assert session.tree.turns[1].parent is session.tree.turns[0] and session.tree.misses == 0

    runner.run(story())


def test_of_turns_that_said_the_same_the_one_whose_calls_are_answered_goes_on(parsing):
    runner, parser = parsing

    async def story():
        async with world(both_places, template=QWEN3, history="keep_thinking", parser=parser) as it:
            session = it.session()
            client = openai.AsyncOpenAI(base_url=f"{it.gateway.url}/v1", api_key=session.key, max_retries=0)
            first, _ = [(await client.chat.completions.create(model="policy", messages=HI, tools=[TOOL])).choices[0]
                        for _ in range(2)]
            await client.chat.completions.create(model="policy", tools=[TOOL], messages=[
                *HI, first.message, *({"role": "tool", "tool_call_id": call.id, "content": "x"}
                                      for call in first.message.tool_calls)])
            assert session.tree.turns[2].parent is session.tree.turns[0]

    runner.run(story())


def test_a_parser_that_sglang_does_not_have_is_named(parsing):
    async def story(*names):
        parser = Parser(*names)
        try:
            await parser.start()
        finally:
            await parser.close()

    with pytest.raises(ValueError, match="rollout.agent.reasoning_parser=nobody is none of SGLang's: apertus"):
        parsing[0].run(story(None, "nobody"))


def test_the_gateway_itself_imports_no_parser():
    code = ("import sys, megatron_rl.environment.gateway.server, megatron_rl.environment.gateway.probe\n"
            "print([name for name in ('sglang', 'openai', 'anthropic') if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
