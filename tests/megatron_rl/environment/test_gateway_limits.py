"""Who may ask, how much, and what the gateway does not do."""

from __future__ import annotations

import aiohttp
import anthropic
import openai
import pytest

from megatron_rl.environment.gateway.messages import depth_of
from tests.megatron_rl.environment.world import OWN_KEY, run, world

HI = [{"role": "user", "content": "Hi"}]
PATHS = [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/v1/messages"), ("POST", "/v1/responses"),
         ("POST", "/sessions"),
         ("GET", "/sessions/x"), ("POST", "/sessions/x/reward"), ("POST", "/sessions/x/end")]


def says(read: str) -> str:
    return "yes"


async def status(http, method: str, path: str, key: str | None, body=None, data=None) -> tuple[int, dict]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    headers |= {} if data is None else {"Content-Type": "application/json"}
    async with http.request(method, path, headers=headers, json=body, data=data) as answer:
        return answer.status, await answer.json()


def test_without_a_valid_key_every_path_answers_401():
    async def story():
        async with world(says) as it, aiohttp.ClientSession(it.gateway.url) as http:
            it.session()
            for method, path in PATHS:
                for key in (None, "", "sk-another", "k\u00e9y"):
                    code, told = await status(http, method, path, key, {} if method == "POST" else None)
                    assert code == 401, (method, path, key)
                    assert "key" in told["error"]["message"]

    run(story())
    assert PATHS


def test_a_sessions_key_opens_nothing_but_that_session():
    async def story():
        async with world(says) as it, aiohttp.ClientSession(it.gateway.url) as http:
            mine, other = it.session(0), it.session(1)
            assert (await status(http, "GET", f"/sessions/{mine.id}", mine.key))[0] == 200
            for method, path in (("GET", ""), ("POST", "/reward"), ("POST", "/end")):
                body = {"reward": 1.0} if method == "POST" else None
                assert (await status(http, method, f"/sessions/{other.id}{path}", mine.key, body))[0] == 403
            assert (await status(http, "POST", "/sessions", mine.key, {}))[0] == 401
            assert other.reward is None and not other.ended.is_set()
            assert (await status(http, "POST", "/v1/chat/completions", OWN_KEY, {"messages": HI}))[0] == 401

    run(story())


def nested(levels: int) -> bytes:
    return b'{"messages": ' + b"[" * levels + b"]" * levels + b"}"


@pytest.mark.parametrize(("data", "code", "says_why"), [
    (b" " * (100 << 20), 413, "rollout.agent.max_body_bytes"),
    (nested(100), 400, "more than 64 levels deep"),
    (nested(100_000), 400, "not JSON, or too deep"),
    (b"{", 400, "not JSON"),
    (b"[1]", 400, "must be a JSON object"),
    (b"\xff\xfe", 400, "not JSON"),
    (b'{"messages": [' + b",".join([b'{"role": "user", "content": "a"}'] * 10_000) + b"]}", 400,
     "messages has 10000 messages, and at most 100 are taken (rollout.agent.max_messages)"),
], ids=["100_MB", "deep", "very_deep", "no_json", "no_object", "no_text", "10_000_messages"])
def test_what_is_too_much_is_refused_and_the_gateway_lives(data, code, says_why):
    async def story():
        async with world(says) as it, aiohttp.ClientSession(it.gateway.url) as http:
            session = it.session()
            found, told = await status(http, "POST", "/v1/chat/completions", session.key, data=data)
            assert found == code and says_why in told["error"]["message"]
            assert not it.engine.asked
            found, _ = await status(http, "POST", "/v1/chat/completions", session.key, {"messages": HI})
            assert found == 200

    run(story())


def test_every_path_limits_what_it_reads():
    """With the key that opens it; each sends its refusal in the form of its protocol."""
    async def story():
        async with world(says) as it, aiohttp.ClientSession(it.gateway.url) as http:
            session = it.session()
            paths = [path.replace("x", session.id) if path.startswith("/sessions/") else path
                     for method, path in PATHS if method == "POST"]
            assert len(paths) == 6
            for path in paths:
                key = OWN_KEY if path.startswith("/sessions") else session.key
                for data, code in ((b" " * (2 << 20), 413), (nested(100), 400), (b"[1]", 400), (b"\x00", 400)):
                    found, told = await status(http, "POST", path, key, data=data)
                    assert found == code and told["error"]["message"], (path, data[:20])
                    assert ("type" in told) == (path == "/v1/messages")
            assert not session.ended.is_set() and not it.engine.asked

    run(story())


def test_a_body_without_a_length_is_limited_as_it_comes():
    async def chunks():
        for _ in range(64):
            yield b" " * (1 << 16)

    async def story():
        async with world(says) as it, aiohttp.ClientSession(it.gateway.url) as http:
            try:
                found, _ = await status(http, "POST", "/v1/chat/completions", it.session().key, data=chunks())
            except aiohttp.ClientError:  # it hung up while we were still sending
                found = 413
            assert found == 413 and not it.engine.asked

    run(story())


@pytest.mark.parametrize(("value", "depth"), [
    ("a", 0), ([], 1), ({"a": [1]}, 2), ([[], {"a": {"b": []}}], 4)])
def test_depth(value, depth):
    assert depth_of(value, 64) == depth


@pytest.mark.parametrize(("asked", "says_why"), [
    ({"messages": []}, "at least one message"),
    ({"messages": "Hi"}, "at least one message"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role must be one of"),
    ({"messages": ["Hi"]}, "messages[0].role must be one of"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages[0].content[0] is of type 'image_url'"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be a text"),
    ({"messages": [*HI, {"role": "assistant", "content": "a", "tool_calls": [{}]}, *HI]},
     "messages[1].tool_calls[0].function.name"),
    ({"messages": [*HI, {"role": "assistant", "content": "a"}]}, "the last message is an assistant's"),
    ({"messages": HI, "n": 2}, "n=2 is not supported"),
    ({"messages": HI, "logprobs": True}, "logprobs=True is not supported"),
    ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format="),
    ({"messages": HI, "tool_choice": "required"}, "tool_choice='required' is not supported"),
    ({"messages": HI, "presence_penalty": 0.5}, "presence_penalty=0.5"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens=0 must be"),
    ({"messages": HI, "stop": [3]}, "stop must be"),
    ({"messages": HI, "tools": [{"type": "web_search"}]}, "tools[0] must be a function"),
    ({"messages": HI, "chat_template_kwargs": 3}, "chat_template_kwargs must be an object"),
])
def test_what_cannot_be_honoured_is_refused_by_name(asked, says_why):
    async def story():
        async with world(says) as it, aiohttp.ClientSession(it.gateway.url) as http:
            code, told = await status(http, "POST", "/v1/chat/completions", it.session().key, asked)
            assert code == 400 and says_why in told["error"]["message"]
            assert told["error"]["type"] == "invalid_request_error" and not it.engine.asked

    run(story())


@pytest.mark.parametrize(("asked", "says_why"), [
    ({"input": []}, "input must be a text or a list of at least one item"),
    ({"input": 3}, "input must be a text or a list of at least one item"),
    ({"input": ["Hi"]}, "input[0] must be an object"),
    ({"input": [{"type": "web_search_call"}]}, "input[0] is of type 'web_search_call'"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "messages[0].content[0] is of type"),
    ({"input": [{"role": "robot", "content": "a"}]}, "messages[0].role must be one of"),
    ({"input": [*HI, {"type": "function_call"}, *HI]}, "messages[1].tool_calls[0].function.name"),
    ({"input": "Hi", "instructions": 3}, "messages[0].content must be a text"),
    ({"input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id='resp_1' is not supported"),
    ({"input": "Hi", "text": {"format": {"type": "json_schema"}}}, "text={'format'"),
    ({"input": "Hi", "max_output_tokens": 0}, "max_tokens=0 must be"),
    ({"input": "Hi", "tools": [{"type": "web_search"}]}, "tools[0] must be a function"),
    ({"input": HI * 101}, "at most 100 are taken"),
])
def test_what_responses_cannot_honour_is_refused_by_name(asked, says_why):
    async def story():
        async with world(says) as it, aiohttp.ClientSession(it.gateway.url) as http:
            code, told = await status(http, "POST", "/v1/responses", it.session().key, asked)
            assert code == 400 and says_why in told["error"]["message"] and not it.engine.asked

    run(story())


def test_each_sdk_reads_a_refusal_as_its_own():
    async def story():
        async with world(says) as it:
            session = it.session()
            client = openai.AsyncOpenAI(base_url=f"{it.gateway.url}/v1", api_key=session.key)
            with pytest.raises(openai.BadRequestError, match="n=2 is not supported"):
                await client.chat.completions.create(model="policy", messages=HI, n=2)
            claude = anthropic.AsyncAnthropic(base_url=it.gateway.url, api_key=session.key)
            with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
                await claude.messages.create(model="policy", max_tokens=9, messages=HI, tool_choice={"type": "any"})
            claude = anthropic.AsyncAnthropic(base_url=it.gateway.url, api_key="sk-wrong")
            with pytest.raises(anthropic.AuthenticationError):
                await claude.messages.create(model="policy", max_tokens=9, messages=HI)

    run(story())


def test_the_runs_temperature_holds_whatever_an_agent_asks_for():
    async def story():
        async with world(says) as it:
            client = openai.AsyncOpenAI(base_url=f"{it.gateway.url}/v1", api_key=it.session().key)
            await client.chat.completions.create(model="policy", messages=HI, temperature=0.0, top_p=0.1, seed=3)
            sampling = it.engine.asked[0]["sampling_params"]
            assert (sampling["temperature"], sampling["top_p"]) == (1.0, 1.0) and sampling["sampling_seed"] != 3

    run(story())
