"""OpenAI's /v1/chat/completions: requests read, answers written, streams synthesised from whole answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from megatron_rl.environment.gateway.errors import RequestError
from megatron_rl.environment.gateway.messages import read_messages
from megatron_rl.environment.gateway.rendering import Options
from megatron_rl.environment.gateway.session import Answered, Asked

UNCHANGED: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1), "logprobs": (None, False), "top_logprobs": (None, 0), "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0), "logit_bias": (None, {}), "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto", "none"), "functions": (None, []), "function_call": (None,),
}
"""Keys that would change what is sampled or told, with the values that ask for nothing."""


def read_request(body: Mapping[str, Any], *, max_messages: int) -> Asked:
    """RequestError names the key that cannot be honoured. Temperature, top_p and seed are the run's, and not read."""
    for key, harmless in UNCHANGED.items():
        if body.get(key) not in harmless:
            raise RequestError(f"{key}={body[key]!r} is not supported; leave it out", code="unsupported_parameter")
    extra = body.get("chat_template_kwargs")
    if extra is not None and not isinstance(extra, Mapping):
        raise RequestError("chat_template_kwargs must be an object")
    tools = () if body.get("tool_choice") == "none" else read_tools(body.get("tools"))
    max_tokens = read_max_tokens(body.get("max_completion_tokens"), body.get("max_tokens"))
    return Asked(read_messages(body.get("messages"), most=max_messages), Options(tools, extra), max_tokens,
                 read_stop(body.get("stop")))


def read_tools(given: Any) -> tuple[Mapping[str, Any], ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise RequestError("tools must be a list")
    for place, tool in enumerate(given):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"tools[{place}] must be a function with a name")
    return tuple(given)


def read_max_tokens(*given: Any) -> int | None:
    """The first that is there."""
    for each in given:
        if each is None:
            continue
        if isinstance(each, bool) or not isinstance(each, int) or each < 1:
            raise RequestError(f"max_tokens={each!r} must be a whole number of at least 1")
        return each
    return None


def read_stop(given: Any) -> tuple[str, ...]:
    stop = [given] if isinstance(given, str) else (given or [])
    if not isinstance(stop, list) or not all(isinstance(each, str) and each for each in stop):
        raise RequestError("stop must be a text or a list of texts")
    return tuple(stop)


def completion(answered: Answered, model: str) -> dict[str, Any]:
    return {"id": _id(answered), "object": "chat.completion", "created": int(time.time()), "model": model,
            "choices": [{"index": 0, "message": _message(answered), "finish_reason": answered.finish_reason,
                         "logprobs": None}],
            "usage": _usage(answered)}


def stream(answered: Answered, model: str, *, usage: bool) -> Iterator[bytes]:
    """The same answer as the events of a stream: role, reasoning, content, calls, end."""
    head = {"id": _id(answered), "object": "chat.completion.chunk", "created": int(time.time()), "model": model}

    def event(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    message = _message(answered)
    yield event({"role": "assistant", "content": ""})
    for key in ("reasoning_content", "content"):
        if message.get(key):
            yield event({key: message[key]})
    for place, call in enumerate(message.get("tool_calls", ())):
        yield event({"tool_calls": [{"index": place, **call}]})
    yield event({}, answered.finish_reason)
    if usage:
        yield _event({**head, "choices": [], "usage": _usage(answered)})
    yield b"data: [DONE]\n\n"


def error(failure: RequestError) -> dict[str, Any]:
    kind = "invalid_request_error" if failure.status < 500 else "server_error"
    return {"error": {"message": str(failure), "type": kind, "param": None, "code": failure.code}}


def _message(answered: Answered) -> dict[str, Any]:
    """Arguments of calls are a JSON text on the wire, as they were sampled."""
    own = answered.turn.answer
    message = {"role": "assistant", "content": own["content"] if own["content"] or "tool_calls" not in own else None}
    if "reasoning_content" in own:
        message["reasoning_content"] = own["reasoning_content"]
    if "tool_calls" in own:
        message["tool_calls"] = [
            {**call, "function": {"name": name, "arguments": arguments}}
            for call, (name, arguments) in zip(own["tool_calls"], answered.parsed.calls, strict=True)]
    return message


def _usage(answered: Answered) -> dict[str, Any]:
    sampled = len(answered.turn.result.output_ids)
    return {"prompt_tokens": answered.prompt_tokens, "completion_tokens": sampled,
            "total_tokens": answered.prompt_tokens + sampled,
            "prompt_tokens_details": {"cached_tokens": answered.turn.result.cached_tokens}}


def _id(answered: Answered) -> str:
    return f"chatcmpl-{answered.turn.history.hex()[:24]}"


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
