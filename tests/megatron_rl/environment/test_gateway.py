"""Conversations over the gateway, driven by the real SDKs: what is sampled stays, token by token."""

from __future__ import annotations

import asyncio

import anthropic
import numpy as np
import openai
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_rl.environment.gateway.session import Asked
from megatron_rl.types import Finish, VersionSpan
from tests.megatron_rl.environment.templates import QWEN3
from tests.megatron_rl.environment.world import CONFIG, CUT, OWN_KEY, World, run, world

USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
HI = [{"role": "user", "content": "Hi"}]


def counting(read: str) -> str:
    """Says how many turns it has seen, awkwardly: spaces that a client may strip."""
    return f" answer {read.count('<|im_start|>assistant')} "


def async_client(it: World, session, **options) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{it.gateway.url}/v1", api_key=session.key, **{"max_retries": 0, **options})


async def chat(client: openai.AsyncOpenAI, messages, **options):
    return (await client.chat.completions.create(model="policy", messages=messages, **options)).choices[0]


async def two_turns(it: World, session) -> None:
    client = async_client(it, session)
    first = await chat(client, HI)
    await chat(client, [*HI, {"role": "assistant", "content": first.message.content},
                        {"role": "user", "content": "More"}])


def test_a_later_turn_goes_on_from_the_very_tokens_that_were_sampled():
    async def story():
        async with world(counting) as it:
            session = it.session()
            await two_turns(it, session)
            first, second = session.tree.turns
            asked = [body["input_ids"] for body in it.engine.asked]
            said = first.result.output_ids.tolist()
            assert it.text(said) == " answer 1 <|im_end|>"
            assert asked[1][:len(asked[0]) + len(said)] == asked[0] + said
            assert it.text(asked[1]) == (USER.format("Hi") + " answer 1 <|im_end|>\n" + USER.format("More"))
            assert second.parent is first and session.tree.misses == 0
            prompt, transcript = second.transcript()
            assert it.text(prompt) == USER.format("Hi")
            assert [*prompt, *transcript.token_ids] == asked[1] + second.result.output_ids.tolist()
            assert it.text(transcript.token_ids[transcript.sampled]) == " answer 1 <|im_end|> answer 2 <|im_end|>"
            sampled = np.concatenate([first.result.logprobs, second.result.logprobs])
            assert transcript.logprobs[transcript.sampled].tolist() == sampled.tolist()
            assert not transcript.logprobs[~transcript.sampled].any()
            begin = len(transcript.token_ids) - len(second.result.output_ids)
            assert transcript.weight_versions == (
                VersionSpan(-1, 0, len(said)), VersionSpan(-1, begin, len(transcript.token_ids)))
            assert transcript.finish is Finish.STOP

    run(story())


PLAIN = """\
{%- for m in messages %}{{ m.role[0] + ':' + m.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'a:' }}{% endif %}"""


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs that reach over where turns meet, and where a model may sample one token or two."""
    merges = [(":", "n"), ("n", "o"), ("o", "\n"), ("\n", "u"), ("e", "\n")]
    pieces = ["<end>", "\n", *(chr(code) for code in range(32, 127)), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, merges))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=PLAIN)


def test_no_merge_of_byte_pairs_reaches_over_turns_or_into_what_was_sampled():
    """The texts of three turns in one piece have other tokens than those that were read and sampled."""
    tokenizer = merging_tokenizer()
    n, o = tokenizer.convert_tokens_to_ids(["n", "o"])
    says = iter([[n, o], [n, o, tokenizer.eos_token_id], [o]])

    async def story():
        async with world(lambda read: next(says), tokenizer=tokenizer) as it:
            session = it.session()
            client, messages = async_client(it, session), [*HI]
            for _ in range(3):
                messages += [(await chat(client, messages)).message, {"role": "user", "content": "More"}]
            asked = [body["input_ids"] for body in it.engine.asked]
            assert asked[1] == [*asked[0], n, o, *tokenizer.encode("\nu:More\na:")]
            assert asked[2] == [*asked[1], n, o, tokenizer.eos_token_id, *tokenizer.encode("\nu:More\na:")]
            assert session.tree.turns[-1].token_ids() == [*asked[2], o] and session.tree.misses == 0
            _, transcript = session.tree.turns[-1].transcript()
            assert transcript.token_ids[transcript.sampled].tolist() == [n, o, n, o, tokenizer.eos_token_id, o]
            for ids in asked[1:]:
                whole = tokenizer.encode(it.text(ids))
                assert whole != ids and ":n" in tokenizer.convert_ids_to_tokens(whole), "this would have been trained"

    run(story())


@pytest.mark.parametrize("echo", [
    lambda message: {"role": "assistant", "content": message.content.strip()},
    lambda message: {"role": "assistant", "content": [{"type": "text", "text": message.content}]},
    lambda message: message,  # the SDK's own object, with all its empty fields
    lambda message: {**message.model_dump(), "reasoning_content": "not sent back as it was"},
], ids=["stripped", "parts", "object", "other_reasoning"])
def test_an_answer_is_known_again_however_a_client_sends_it_back(echo):
    async def story():
        async with world(counting) as it:
            session = it.session()
            client = async_client(it, session)
            first = await chat(client, HI)
            await chat(client, [*HI, echo(first.message), {"role": "user", "content": "More"}])
            assert session.tree.turns[1].parent is session.tree.turns[0] and session.tree.misses == 0

    run(story())


def test_an_answer_that_is_not_ours_is_a_new_root_and_counted():
    async def story():
        async with world(counting) as it:
            session = it.session()
            client = async_client(it, session)
            await chat(client, HI)
            await chat(client, [*HI, {"role": "assistant", "content": "I never said this."},
                                {"role": "user", "content": "More"}])
            assert [turn.parent for turn in session.tree.turns] == [None, None] and session.tree.misses == 1
            prompt, transcript = session.tree.turns[1].transcript()
            assert "I never said this." in it.text(prompt), "context of a new root, and never trained on"
            assert it.text(transcript.token_ids[transcript.sampled]) == " answer 2 <|im_end|>"

    run(story())


def test_a_retry_is_a_sibling_with_another_seed_and_either_goes_on():
    async def story():
        says = iter(["one", "two", "same", "same", "end"])
        async with world(lambda read: next(says)) as it:
            session = it.session()
            client = async_client(it, session)
            for _ in range(2):
                await chat(client, HI)
            await chat(client, [*HI, {"role": "assistant", "content": "one"}, {"role": "user", "content": "More"}])
            one, two, later = session.tree.turns
            assert one.parent is two.parent is None and later.parent is one
            seeds = [body["sampling_params"]["sampling_seed"] for body in it.engine.asked]
            assert len(set(seeds)) == 3
            assert len({body["rid"] for body in it.engine.asked}) == 3

    run(story())


def test_a_run_with_the_same_seed_asks_with_the_same_seeds():
    async def story() -> list[int]:
        async with world(counting) as it:
            await two_turns(it, it.session())
            await two_turns(it, it.session(sample=1))
            return [body["sampling_params"]["sampling_seed"] for body in it.engine.asked]

    seeds = run(story())
    assert seeds == run(story()) and len(set(seeds)) == 4


def test_an_answer_that_was_cut_off_is_closed_by_the_template():
    async def story():
        async with world(counting) as it:
            session = it.session()
            client = async_client(it, session)
            first = await chat(client, HI, max_tokens=4)
            assert (first.message.content, first.finish_reason) == (" ans", "length")
            await chat(client, [*HI, first.message, {"role": "user", "content": "More"}])
            assert it.text(it.engine.asked[1]["input_ids"]) == (
                USER.format("Hi") + " ans<|im_end|>\n" + USER.format("More"))
            assert session.tree.turns[1].parent is session.tree.turns[0]
            assert not session.cut, "the agent asked for no more"

    run(story())


def test_a_stop_text_is_sampled_and_not_shown():
    async def story():
        async with world(lambda read: "let me see: calc(1) and so on") as it:
            session = it.session()
            answer = await chat(async_client(it, session), HI, stop=["calc("])
            assert (answer.message.content, answer.finish_reason) == ("let me see: ", "stop")
            assert it.text(session.tree.turns[0].result.output_ids) == "let me see: calc("

    run(story())


def test_streams_say_what_whole_answers_say():
    async def story():
        async with world(counting) as it:
            session = it.session()
            client = async_client(it, session)
            chunks = [chunk async for chunk in await client.chat.completions.create(
                model="policy", messages=HI, stream=True, stream_options={"include_usage": True})]
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert said == " answer 1 "
            assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
            usage = chunks[-1].usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(it.engine.asked[0]["input_ids"]), 11)
            await chat(client, [*HI, {"role": "assistant", "content": said}, {"role": "user", "content": "More"}])
            assert session.tree.turns[1].parent is session.tree.turns[0]
            claude = anthropic.AsyncAnthropic(base_url=it.gateway.url, api_key=session.key, max_retries=0)
            async with claude.messages.stream(model="policy", max_tokens=50, messages=HI) as events:
                message = await events.get_final_message()
            assert (message.content[0].text, message.stop_reason) == (" answer 1 ", "end_turn")
            assert message.usage.output_tokens == 11

    run(story())


def test_synchronous_clients_of_both_kinds_work_from_environment_variables(monkeypatch):
    async def story():
        async with world(counting) as it:
            session = it.session()
            for name, value in {"OPENAI_BASE_URL": f"{it.gateway.url}/v1", "OPENAI_API_KEY": session.key,
                                "ANTHROPIC_BASE_URL": it.gateway.url, "ANTHROPIC_API_KEY": session.key}.items():
                monkeypatch.setenv(name, value)

            def talk() -> list[str]:
                client = openai.OpenAI()
                said = client.chat.completions.create(model="policy", messages=HI).choices[0].message.content
                message = anthropic.Anthropic().messages.create(
                    model="policy", max_tokens=20, system="Be brief.",
                    messages=[*HI, {"role": "assistant", "content": [{"type": "text", "text": said}]},
                              {"role": "user", "content": "More"}])
                return [said, message.content[0].text, client.models.list().data[0].id]

            assert await asyncio.to_thread(talk) == [" answer 1 ", " answer 2 ", "policy"]
            assert it.text(it.engine.asked[1]["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")

    run(story())


def test_responses_say_what_a_chat_says_whole_and_as_a_stream():
    async def story():
        async with world(counting) as it:
            session = it.session()
            client = async_client(it, session)
            first = await client.responses.create(model="policy", instructions="Be brief.", input="Hi")
            assert first.output_text == " answer 1 " and first.usage.output_tokens == 11
            more = [{"role": "user", "content": "Hi"}, *first.output, {"role": "user", "content": "More"}]
            events = [event async for event in await client.responses.create(
                model="policy", instructions="Be brief.", input=more, max_output_tokens=3, stream=True)]
            last = events[-1].response
            texts = [event.delta for event in events if event.type == "response.output_text.delta"]
            assert texts == [last.output_text] == [" an"] and events[-1].type == "response.incomplete"
            assert [event.sequence_number for event in events] == list(range(len(events)))
            assert (last.status, last.incomplete_details.reason) == ("incomplete", "max_output_tokens")
            one, two = session.tree.turns
            assert two.parent is one and session.tree.misses == 0
            assert it.text(one.given).startswith("<|im_start|>system\nBe brief.")
            messages = [{"role": "system", "content": "Be brief."}, *HI, {"role": "assistant", "content": " answer 1 "},
                        {"role": "user", "content": "Again"}]
            await chat(client, messages)
            assert session.tree.turns[2].parent is one, "the same conversation by another protocol"

    run(story())


def test_both_protocols_speak_in_one_conversation():
    async def story():
        async with world(counting) as it:
            session = it.session()
            first = await chat(async_client(it, session), HI)
            claude = anthropic.AsyncAnthropic(base_url=it.gateway.url, api_key=session.key, max_retries=0)
            await claude.messages.create(model="policy", max_tokens=20, messages=[
                *HI, {"role": "assistant", "content": first.message.content}, {"role": "user", "content": "More"}])
            assert session.tree.turns[1].parent is session.tree.turns[0]

    run(story())


def test_thinking_that_a_client_leaves_out_stays_where_it_was_sampled():
    async def story():
        async with world(lambda read: "<think>\nhm\n</think>\n\nyes", template=QWEN3, history="keep_thinking") as it:
            session = it.session()
            client = async_client(it, session)
            first = await chat(client, HI)
            await chat(client, [*HI, first.message, {"role": "user", "content": "More"}])
            assert it.text(it.engine.asked[1]["input_ids"]) == (
                USER.format("Hi") + "<think>\nhm\n</think>\n\nyes<|im_end|>\n" + USER.format("More"))

    run(story())


def test_sessions_that_share_a_prefix_share_no_turn():
    async def story():
        async with world(counting) as it:
            one, other = it.session(0), it.session(1)
            await asyncio.gather(two_turns(it, one), two_turns(it, other))
            assert [len(one.tree.turns), len(other.tree.turns)] == [2, 2]
            assert not set(map(id, one.tree.turns)) & set(map(id, other.tree.turns))
            assert one.tree.turns[1].parent is one.tree.turns[0]
            assert other.tree.turns[1].parent is other.tree.turns[0]

    run(story())


def test_a_request_that_is_given_up_is_aborted_and_leaves_no_turn():
    async def story():
        async with world(counting, latency_s=600.0) as it:
            session = it.session()
            request = asyncio.create_task(chat(async_client(it, session), HI))
            while not it.engine.asked:
                await asyncio.sleep(0.01)
            request.cancel()
            while not it.engine.aborted:
                await asyncio.sleep(0.01)
            assert session.tree.turns == [] and it.engine.aborted == [it.engine.asked[0]["rid"]]
            it.engine._latency_s = 0.0
            await chat(async_client(it, session), HI)
            assert len(session.tree.turns) == 1, "the session goes on"

    run(story())


def test_a_client_that_retries_gets_its_answer():
    async def story():
        async with world(counting) as it:
            session = it.session()

            async def hold_the_first(request, body, answer):
                if len(it.engine.asked) == 1:
                    await asyncio.sleep(600)

            it.engine.spoil = hold_the_first
            done = await chat(async_client(it, session, timeout=3.0, max_retries=9), HI)
            assert done.message.content == " answer 1 "
            # the request that was held makes no turn; a later one does, even if the client no longer listens
            assert 0 < len(session.tree.turns) < len(it.engine.asked)

    run(story())


def test_an_engine_that_fails_is_the_sessions_failure():
    def broken(read: str) -> str:
        raise RuntimeError("no answer")

    async def story():
        async with world(broken) as it:
            session = it.session()
            for _ in range(2):
                with pytest.raises(openai.InternalServerError, match="no engine could answer") as failed:
                    await chat(async_client(it, session), HI)
                assert failed.value.status_code == 503
            assert "no response after 1 attempts" in str(session.failure)
            assert len(it.engine.asked) == 1, "nothing more is asked for a response that has failed"

    run(story())


def test_a_session_that_ends_takes_its_requests_with_it():
    async def story():
        async with world(counting, latency_s=30.0) as it:
            session = it.session()
            request = asyncio.create_task(chat(async_client(it, session), HI))
            while not it.engine.asked:
                await asyncio.sleep(0.01)
            await it.gateway.end(session)
            with pytest.raises(openai.APIError):
                await request
            assert it.engine.aborted == [it.engine.asked[0]["rid"]]
            with pytest.raises(openai.AuthenticationError):
                await chat(async_client(it, session), HI)

    run(story())


def test_a_request_that_is_given_up_twice_is_aborted_once_and_to_the_end():
    """A program that is killed hangs up, and its session ends: the engine must hear of it all the same."""
    async def story():
        async with world(counting) as it:
            session, aborted = it.session(), []
            asked, aborting = asyncio.Event(), asyncio.Event()

            async def endless(*args, **options):
                try:
                    asked.set()
                    await asyncio.sleep(600)
                finally:
                    aborting.set()
                    await asyncio.sleep(0.5)  # as the fleet, which tells the engine
                    aborted.append(True)

            it.fleet.generate = endless
            request = asyncio.create_task(session.answer(Asked(HI)))
            await asked.wait()
            request.cancel()
            await aborting.wait()
            await session.close()
            assert aborted == [True] and request.cancelled()

    run(story())


def test_turns_share_the_limits_of_a_response():
    """100 tokens after the first request: 40 said, 45 rendered, so 15 are left; then none."""
    async def story():
        config = CONFIG.__class__(max_response_tokens=100, max_context_tokens=400, prompts_per_step=1, retries=0)
        async with world(lambda read: "x" * 200 + CUT, config=config) as it:
            session = it.session()
            client = async_client(it, session)
            first = await chat(client, HI, max_tokens=40)
            more = [*HI, first.message, {"role": "user", "content": "y" * 24}]  # and 21 around them
            second = await chat(client, more)
            _, transcript = session.tree.turns[-1].transcript()
            assert (len(second.message.content), second.finish_reason) == (100 - 40 - 45, "length")
            assert len(transcript.token_ids) == 100 and session.cut
            with pytest.raises(openai.BadRequestError, match="no room for an answer") as refused:
                await chat(client, [*more, second.message, {"role": "user", "content": "z"}])
            assert refused.value.code == "context_length_exceeded"
            assert "rollout.max_response_tokens=100" in str(refused.value)

    run(story())


def test_sessions_are_opened_rewarded_and_ended_over_http():
    async def story():
        async with world(counting) as it:
            import aiohttp

            async with aiohttp.ClientSession(it.gateway.url) as http:
                own = {"Authorization": f"Bearer {OWN_KEY}"}
                async with http.post("/sessions", json={"prompt_id": "p", "sample": 3}, headers=own) as answer:
                    opened = await answer.json()
                mine = {"Authorization": f"Bearer {opened['api_key']}"}
                client = openai.AsyncOpenAI(base_url=f"{it.gateway.url}/v1", api_key=opened["api_key"])
                assert (await chat(client, HI)).message.content == " answer 1 "
                where = f"/sessions/{opened['id']}"
                async with http.post(f"{where}/reward", json={"reward": 0.5}, headers=mine) as answer:
                    state = await answer.json()
                assert state == {"id": opened["id"], "prompt_id": "p", "sample": 3, "turns": 1, "misses": 0,
                                 "unparsed": 0, "reward": 0.5, "closed": False, "sampled_tokens": 11}
                for bad in (None, "1", True, [1]):
                    async with http.post(f"{where}/reward", json={"reward": bad}, headers=mine) as answer:
                        assert answer.status == 400
                async with http.post(f"{where}/end", json={}, headers=own) as answer:
                    assert (await answer.json())["closed"] is True
                async with http.get(where, headers=mine) as answer:
                    assert answer.status == 401

    run(story())
