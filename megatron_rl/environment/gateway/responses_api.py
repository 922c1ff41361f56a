"""OpenAI's /v1/responses: items turned into messages, answers and streams written as items. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from megatron_rl.environment.gateway.errors import RequestError
from megatron_rl.environment.gateway.messages import Message, read_messages
from megatron_rl.environment.gateway.openai_api import read_max_tokens, read_tools
from megatron_rl.environment.gateway.rendering import Options
from megatron_rl.environment.gateway.session import Answered, Asked

UNCHANGED: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (None,), "conversation": (None,), "prompt": (None,), "background": (None, False),
    "top_logprobs": (None, 0), "text": (None, {"format": {"type": "text"}}), "tool_choice": (None, "auto", "none"),
}
"""Keys that would change what is sampled or told, with the values that ask for nothing."""
TEXTS = ("input_text", "output_text", "text")


def read_request(body: Mapping[str, Any], *, max_messages: int) -> Asked:
    """RequestError names the key that cannot be honoured. Temperature and top_p are the run's, and not read."""
    for key, harmless in UNCHANGED.items():
        if body.get(key) not in harmless:
            raise RequestError(f"{key}={body[key]!r} is not supported; leave it out", code="unsupported_parameter")
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        raise RequestError("input must be a text or a list of at least one item")
    messages: list[Message] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    for place, item in enumerate(items):
        if len(messages) > max_messages:
            break
        _append(messages, item, f"input[{place}]")
    tools = () if body.get("tool_choice") == "none" else _read_tools(body.get("tools"))
    return Asked(read_messages(messages, most=max_messages), Options(tools), read_max_tokens(
        body.get("max_output_tokens")))


def _append(messages: list[Message], item: Any, where: str) -> None:
    """Thinking, text and calls that follow each other are one message of the assistant."""
    if not isinstance(item, Mapping):
        raise RequestError(f"{where} must be an object")
    kind = item.get("type", "message")
    if kind == "function_call_output":
        messages.append({"role": "tool", "content": _parts(item.get("output")),
                         "tool_call_id": item.get("call_id", "")})
        return
    if kind == "message" and item.get("role") != "assistant":
        messages.append({"role": item.get("role"), "content": _parts(item.get("content"))})
        return
    if kind not in ("message", "function_call", "reasoning"):
        raise RequestError(f"{where} is of type {kind!r}, which cannot be read")
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    own = messages[-1]
    if kind == "message":
        if own["content"] or "tool_calls" in own:
            own = {"role": "assistant", "content": ""}
            messages.append(own)
        own["content"] = _parts(item.get("content"))
    elif kind == "function_call":
        own.setdefault("tool_calls", []).append({
            "id": item.get("call_id", ""), "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments", "{}")}})


def _parts(content: Any) -> Any:
    """The texts of a list in OpenAI's other form; what is no text is refused by read_messages."""
    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": part.get("text")} if isinstance(part, Mapping) and part.get("type") in TEXTS
            else part for part in content]


def _read_tools(given: Any) -> tuple[Mapping[str, Any], ...]:
    """Functions lie flat here, and one level deeper in a chat template."""
    if not isinstance(given, list):
        return read_tools(given)
    return read_tools([
        {"type": "function", "function": {key: tool[key] for key in ("name", "description", "parameters")
                                          if tool.get(key) is not None}}
        if isinstance(tool, Mapping) and tool.get("type") == "function" else tool for tool in given])


def response(answered: Answered, model: str) -> dict[str, Any]:
    cut = answered.finish_reason == "length"
    sampled, cached = len(answered.turn.result.output_ids), answered.turn.result.cached_tokens
    return {**_head(answered, model), "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "output": _items(answered),
            "usage": {"input_tokens": answered.prompt_tokens, "input_tokens_details": {"cached_tokens": cached},
                      "output_tokens": sampled, "output_tokens_details": {"reasoning_tokens": 0},
                      "total_tokens": answered.prompt_tokens + sampled}}


def stream(answered: Answered, model: str) -> Iterator[bytes]:
    """The same answer as the events of a stream: each item begins, comes whole, and ends."""
    whole = response(answered, model)
    events: list[tuple[str, dict[str, Any]]] = [
        ("response.created", {"response": {**whole, "status": "in_progress", "output": [], "usage": None}})]
    for index, item in enumerate(whole["output"]):
        at = {"item_id": item["id"], "output_index": index}
        empty = {**item, "status": "in_progress"} | (
            {"arguments": ""} if item["type"] == "function_call" else {"content": []})
        events.append(("response.output_item.added", {"output_index": index, "item": empty}))
        if item["type"] == "function_call":
            events += [("response.function_call_arguments.delta", {**at, "delta": item["arguments"]}),
                       ("response.function_call_arguments.done", {**at, "name": item["name"],
                                                                  "arguments": item["arguments"]})]
        elif item["type"] == "message":
            part, at = item["content"][0], {**at, "content_index": 0}
            events += [("response.content_part.added", {**at, "part": {**part, "text": ""}}),
                       ("response.output_text.delta", {**at, "delta": part["text"], "logprobs": []}),
                       ("response.output_text.done", {**at, "text": part["text"], "logprobs": []}),
                       ("response.content_part.done", {**at, "part": part})]
        events.append(("response.output_item.done", {"output_index": index, "item": item}))
    events.append((f"response.{whole['status']}", {"response": whole}))
    for number, (kind, fields) in enumerate(events):
        yield f"event: {kind}\ndata: ".encode() + orjson.dumps(
            {"type": kind, "sequence_number": number, **fields}) + b"\n\n"


def _items(answered: Answered) -> list[dict[str, Any]]:
    own, name = answered.turn.answer, answered.turn.history.hex()[:24]
    items: list[dict[str, Any]] = []
    if "reasoning_content" in own:
        items.append({"id": f"rs_{name}", "type": "reasoning", "summary": [], "status": "completed",
                      "content": [{"type": "reasoning_text", "text": own["reasoning_content"]}]})
    if own["content"] or "tool_calls" not in own:
        items.append({"id": f"msg_{name}", "type": "message", "role": "assistant", "status": "completed",
                      "content": [{"type": "output_text", "text": own["content"], "annotations": []}]})
    for call, (function, arguments) in zip(own.get("tool_calls", ()), answered.parsed.calls, strict=True):
        items.append({"id": f"fc_{call['id']}", "type": "function_call", "call_id": call["id"], "name": function,
                      "arguments": arguments, "status": "completed"})
    return items


def _head(answered: Answered, model: str) -> dict[str, Any]:
    return {"id": f"resp_{answered.turn.history.hex()[:24]}", "object": "response", "created_at": int(time.time()),
            "model": model, "error": None, "instructions": None, "metadata": {}, "parallel_tool_calls": True,
            "temperature": None, "top_p": None, "tool_choice": "auto", "tools": []}
