"""Anthropic's /v1/messages: requests turned into OpenAI's form, answers and streams written as blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from megatron_rl.environment.gateway.errors import RequestError
from megatron_rl.environment.gateway.messages import Message, read_messages, read_text
from megatron_rl.environment.gateway.openai_api import read_max_tokens, read_stop
from megatron_rl.environment.gateway.rendering import Options
from megatron_rl.environment.gateway.session import Answered, Asked

KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         413: "request_too_large", 503: "overloaded_error"}
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


def read_request(body: Mapping[str, Any], *, max_messages: int) -> Asked:
    """RequestError names the key that cannot be honoured. Temperature, top_p and top_k are the run's, and not read."""
    choice = body.get("tool_choice") or {"type": "auto"}
    if not isinstance(choice, Mapping) or choice.get("type") not in ("auto", "none"):
        raise RequestError(f"tool_choice={choice!r} is not supported; leave it out", code="unsupported_parameter")
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise RequestError("messages must be a list of at least one message")
    messages: list[Message] = []
    if body.get("system"):
        messages.append({"role": "system", "content": read_text(body["system"], "system")})
    for place, message in enumerate(given):
        if len(messages) > max_messages:
            break
        messages += _read(message, f"messages[{place}]")
    tools = () if choice["type"] == "none" else _read_tools(body.get("tools"))
    return Asked(read_messages(messages, most=max_messages), Options(tools), read_max_tokens(body.get("max_tokens")),
                 read_stop(body.get("stop_sequences")))


def _read(given: Any, where: str) -> list[Message]:
    """A user's message may hold results of several tools, which are messages of their own in OpenAI's form."""
    if not isinstance(given, Mapping) or given.get("role") not in ("user", "assistant"):
        raise RequestError(f"{where}.role must be user or assistant")
    if isinstance(given.get("content"), str):
        return [{"role": given["role"], "content": given["content"]}]
    blocks = given.get("content")
    if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
        raise RequestError(f"{where}.content must be a text or a list of blocks")
    return (_read_answer if given["role"] == "assistant" else _read_user)(blocks, where)


def _read_user(blocks: list[Mapping[str, Any]], where: str) -> list[Message]:
    messages: list[Message] = []
    texts = []
    for place, block in enumerate(blocks):
        if block.get("type") == "tool_result":
            content = read_text(block.get("content"), f"{where}.content[{place}].content")
            messages.append({"role": "tool", "content": content, "tool_call_id": str(block.get("tool_use_id", ""))})
        else:
            texts.append(read_text([block], f"{where}.content[{place}]"))
    return messages + ([{"role": "user", "content": "".join(texts)}] if texts or not messages else [])


def _read_answer(blocks: list[Mapping[str, Any]], where: str) -> list[Message]:
    message: Message = {"role": "assistant", "content": ""}
    calls = []
    for place, block in enumerate(blocks):
        if block.get("type") == "tool_use":
            calls.append({"id": block.get("id", ""), "type": "function",
                          "function": {"name": block.get("name"), "arguments": block.get("input", {})}})
        elif block.get("type") == "thinking":
            message["reasoning_content"] = block.get("thinking", "")
        else:
            message["content"] += read_text([block], f"{where}.content[{place}]")
    return [message | ({"tool_calls": calls} if calls else {})]


def _read_tools(given: Any) -> tuple[Mapping[str, Any], ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise RequestError("tools must be a list")
    tools = []
    for place, tool in enumerate(given):
        if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
            raise RequestError(f"tools[{place}].name must be a text")
        if not isinstance(tool.get("input_schema"), Mapping):
            raise RequestError(f"tools[{place}].input_schema must be an object; tools of Anthropic's own servers are "
                               "not here")
        tools.append({"type": "function", "function": {
            "name": tool["name"], "description": tool.get("description", ""), "parameters": tool["input_schema"]}})
    return tuple(tools)


def answer(answered: Answered, model: str) -> dict[str, Any]:
    return {**_head(answered, model), "content": _blocks(answered), "stop_reason": _stop_reason(answered),
            "stop_sequence": _stop_sequence(answered), "usage": _usage(answered)}


def stream(answered: Answered, model: str) -> Iterator[bytes]:
    """The same answer as the events of a stream: each block begins, comes whole, and ends."""
    yield _event("message_start", message={**_head(answered, model), "content": [], "stop_reason": None,
                                           "stop_sequence": None, "usage": {**_usage(answered), "output_tokens": 0}})
    for index, block in enumerate(_blocks(answered)):
        if block["type"] == "tool_use":
            empty, delta = {**block, "input": {}}, {"type": "input_json_delta",
                                                    "partial_json": orjson.dumps(block["input"]).decode()}
        elif block["type"] == "thinking":
            empty, delta = {**block, "thinking": ""}, {"type": "thinking_delta", "thinking": block["thinking"]}
        else:
            empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
        yield _event("content_block_start", index=index, content_block=empty)
        yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)
    yield _event("message_delta", delta={"stop_reason": _stop_reason(answered),
                                         "stop_sequence": _stop_sequence(answered)}, usage=_usage(answered))
    yield _event("message_stop")


def error(failure: RequestError) -> dict[str, Any]:
    return {"type": "error", "error": {"type": KINDS.get(failure.status, "invalid_request_error"),
                                       "message": str(failure)}}


def _blocks(answered: Answered) -> list[dict[str, Any]]:
    own = answered.turn.answer
    blocks = []
    if "reasoning_content" in own:
        blocks.append({"type": "thinking", "thinking": own["reasoning_content"], "signature": ""})
    if own["content"] or "tool_calls" not in own:
        blocks.append({"type": "text", "text": own["content"]})
    for call in own.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        blocks.append({"type": "tool_use", "id": call["id"], "name": call["function"]["name"],
                       "input": arguments if isinstance(arguments, dict) else {"arguments": arguments}})
    return blocks


def _head(answered: Answered, model: str) -> dict[str, Any]:
    return {"id": f"msg_{answered.turn.history.hex()[:24]}", "type": "message", "role": "assistant", "model": model}


def _stop_sequence(answered: Answered) -> str | None:
    matched = answered.turn.result.finish_detail.get("matched")
    return matched if isinstance(matched, str) else None


def _stop_reason(answered: Answered) -> str:
    if _stop_sequence(answered) is not None and not answered.parsed.calls:
        return "stop_sequence"
    return STOP_REASONS[answered.finish_reason]


def _usage(answered: Answered) -> dict[str, int]:
    cached = answered.turn.result.cached_tokens
    return {"input_tokens": answered.prompt_tokens - cached, "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0, "output_tokens": len(answered.turn.result.output_ids)}


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + orjson.dumps({"type": kind, **fields}) + b"\n\n"
