"""Chat messages in one form, and what makes two histories the same.

The form is OpenAI's with plain text as content and the arguments of calls as objects, which is what chat templates
read. A history is compared by a chain of digests, one for each message. What a client may change when it sends our
answer back takes no part: ids of calls, reasoning, white space around an answer, spacing and order inside arguments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from megatron_rl.environment.gateway.errors import RequestError

Message = dict[str, Any]
"""role, content; tool_calls and reasoning_content of an assistant; tool_call_id of a tool."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def read_messages(given: Any, *, most: int) -> list[Message]:
    """The messages of a request to /v1/chat/completions. RequestError names the place of what is wrong."""
    if not isinstance(given, list) or not given:
        raise RequestError("messages must be a list of at least one message")
    if len(given) > most:
        raise RequestError(f"messages has {len(given)} messages, and at most {most} are taken "
                           "(rollout.agent.max_messages)", code="too_many_messages")
    return [_read(message, f"messages[{place}]") for place, message in enumerate(given)]


def _read(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping) or given.get("role") not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}")
    role = ROLES[given["role"]]
    message: Message = {"role": role, "content": read_text(given.get("content"), f"{where}.content")}
    if role == "assistant":
        calls = given.get("tool_calls") or []
        if not isinstance(calls, list):
            raise RequestError(f"{where}.tool_calls must be a list")
        if calls:
            message["tool_calls"] = [_read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
        reasoning = given.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning:
            message["reasoning_content"] = reasoning
    if role == "tool":
        message["tool_call_id"] = str(given.get("tool_call_id", ""))
    return message


def read_text(content: Any, where: str) -> str:
    """The text of a string, of None, or of a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a text or a list of text parts")
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(f"{where}[{place}] is of type {kind!r}, and only text can be read")
    return "".join(part["text"] for part in content)


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.function.name must be a text")
    return {"id": str(call.get("id", "")), "type": "function",
            "function": {"name": function["name"], "arguments": read_arguments(function.get("arguments", "{}"))}}


def read_arguments(arguments: Any) -> Any:
    """The object that a JSON text holds; the text itself if it holds none."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    return found if isinstance(found, dict) else arguments


def call_ids(message: Message) -> tuple[str, ...]:
    return tuple(call["id"] for call in message.get("tool_calls", ()))


def chain(shared: Any, messages: Sequence[Message]) -> list[bytes]:
    """digest[i] stands for messages[0..i] under `shared` (tools and options of the template)."""
    digests, before = [], hashlib.sha256(orjson.dumps(shared, option=orjson.OPT_SORT_KEYS)).digest()
    for message in messages:
        before = extended(before, message)
        digests.append(before)
    return digests


def extended(before: bytes, message: Message) -> bytes:
    """The digest of the history whose digest is `before`, and one message more."""
    said = message["content"].strip() if message["role"] == "assistant" else message["content"]
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())]
    form = orjson.dumps([message["role"], said, calls], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(before + form).digest()


def depth_of(value: Any, most: int) -> int:
    """How deep lists and objects lie in each other, counted up to most + 1; without recursion."""
    level, depth = [value], 0
    while level and depth <= most:
        inside: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inside.extend(each.values())
            elif isinstance(each, list):
                inside.extend(each)
        if not any(isinstance(each, dict | list) for each in level):
            break
        level, depth = inside, depth + 1
    return depth
