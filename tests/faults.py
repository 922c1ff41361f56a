"""Environments, judges and engines that fail as a prompt asks them to: its metadata names the fault.

Environments and judges are reached by their dotted paths: `tests.faults.environment`, `tests.faults.judge`.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

from megatron_rl.types import Prompt, Score

HALF_A_CHARACTER = "caf\udce9"  # what Python makes of a byte that is not UTF-8 (errors="surrogateescape")


class Unspeakable(Exception):
    """An error that cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def _raise(error: BaseException) -> None:
    raise error


OVER = threading.Event()
"""Set once nobody waits any more for what hangs and works: it would slow down whatever else this process does."""


def _busy() -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and not OVER.is_set():
        pass


RAISING: dict[str, Callable[[], Any]] = {
    "raises": lambda: _raise(KeyError("no such tool")),
    "raises an error without words": lambda: _raise(Unspeakable()),
    "raises an error that is not UTF-8": lambda: _raise(ValueError(HALF_A_CHARACTER)),
    "raises a huge error": lambda: _raise(ValueError("x" * 10_000_000)),
    "exits": lambda: _raise(SystemExit(3)),
    "stops an iteration": lambda: next(iter(())),
    "recurses": lambda: _recurse(),
}


def _recurse() -> None:
    _recurse()


ENVIRONMENTS: dict[str, Callable[[], Any]] = {
    **RAISING,
    "is cancelled": lambda: _raise(asyncio.CancelledError()),
    "hangs": lambda: time.sleep(60),
    "hangs and works": _busy,
    "returns a number": lambda: math.nan,
    "returns bytes": lambda: b"caf\xe9",
    "returns other fields": lambda: {"observation": "7"},
    "returns a tuple": lambda: ("7", 0.5),
    "returns a huge text": lambda: "x" * 30_000_000,
    "returns a text that is not UTF-8": lambda: HALF_A_CHARACTER,
}

JUDGES: dict[str, Callable[[], Any]] = {
    **RAISING,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ends its process": lambda: os._exit(0),
    "ends its process with a code": lambda: os._exit(7),
    "breaks its memory": lambda: ctypes.string_at(0),
    "takes all memory": lambda: bytearray(64 << 30),
    "returns nothing": lambda: None,
    "returns NaN": lambda: math.nan,
    "returns infinity": lambda: math.inf,
    "returns more than float32 holds": lambda: 1e300,
    "returns what float32 cannot square": lambda: -1e30,
    "returns a huge integer": lambda: 10 ** 1000,
    "returns a text": lambda: "0.5",
    "returns other fields": lambda: {"reward": 1.0},
    "returns a score of NaN": lambda: Score(math.nan, "correct"),
    "returns an unknown status": lambda: Score(1.0, "splendid"),
    "returns another detail": lambda: Score(1.0, "correct", detail=7),
}

HANGING_JUDGES: dict[str, Callable[[], Any]] = {"hangs": lambda: time.sleep(60), "hangs and works": _busy,
                                               "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP)}
"""Not failed: a response that cannot be judged in time earns 0 (status `timeout`), since its own text may be why."""


def environment(prompt: Prompt, turns: Sequence[str]) -> str | None:
    """Ends the episode at the first turn, unless the prompt's metadata names one of ENVIRONMENTS."""
    fault = prompt.metadata.get("environment")
    return ENVIRONMENTS[fault]() if fault else None


def judge(prompt: Prompt, response_text: str) -> Any:
    """1 for a text of an even length, unless the prompt's metadata names a fault."""
    fault = prompt.metadata.get("judge")
    faults = {**JUDGES, **HANGING_JUDGES}
    return faults[fault]() if fault else float(len(response_text) % 2 == 0)


def changed(answer: dict[str, Any], **meta: Any) -> dict[str, Any]:
    return {**answer, "meta_info": {**answer["meta_info"], **meta}}


def with_tokens(answer: dict[str, Any], *tokens: int) -> dict[str, Any]:
    """The answer with these tokens instead."""
    return changed({**answer, "output_ids": list(tokens)},
                   output_token_logprobs=[[-1.0, token, None] for token in tokens],
                   weight_versions=[{"version": "0", "start": 0, "end": len(tokens)}])


ANSWERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "null": lambda answer: None,
    "a list": lambda answer: [answer],
    "a text": lambda answer: "tokens",
    "other fields": lambda answer: {"text": "tokens"},
    "no meta": lambda answer: {**answer, "meta_info": None},
    "tokens as text": lambda answer: {**answer, "output_ids": "tokens"},
    "no token": with_tokens,
    "a negative token": lambda answer: with_tokens(answer, 5, -1),
    "a token beyond the vocabulary": lambda answer: with_tokens(answer, 5, 10**6),
    "a token beyond all integers": lambda answer: with_tokens(answer, 2**40),
    "more tokens than asked for": lambda answer: with_tokens(answer, *[5] * 1000),
    "log-probabilities of NaN": lambda answer: changed(
        answer, output_token_logprobs=[[None, *rest] for _, *rest in answer["meta_info"]["output_token_logprobs"]]),
    "too few log-probabilities": lambda answer: changed(
        answer, output_token_logprobs=answer["meta_info"]["output_token_logprobs"][1:]),
    "no version": lambda answer: changed(answer, weight_versions=[]),
    "versions with a gap": lambda answer: changed(
        with_tokens(answer, 5, 6, 7), weight_versions=[{"version": "0", "start": 0, "end": 1},
                                                       {"version": "0", "start": 2, "end": 3}]),
    "versions of too few tokens": lambda answer: changed(
        with_tokens(answer, 5, 6, 7), weight_versions=[{"version": "0", "start": 0, "end": 2}]),
    "versions that are words": lambda answer: changed(
        answer, weight_versions=[{"version": "new", "start": 0, "end": 1}]),
    "an unknown finish": lambda answer: changed(answer, finish_reason={"type": "tired"}),
    "a finish of null": lambda answer: changed(answer, finish_reason=None),
    "an abort that nobody asked for": lambda answer: changed(answer, finish_reason={"type": "abort"}),
}
"""What an engine says instead of its answer."""


async def refuses(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "The input (600 tokens) is longer than the context"}}, status=400)


async def breaks(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "internal error"}}, status=500)


async def is_not_utf8(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"caf\xe9", content_type="text/plain")


async def is_half(request: web.Request) -> web.StreamResponse:
    return web.Response(text='{"output_ids": [1, 2', content_type="application/json")


async def hangs(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def hangs_up(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"output_ids"')
    request.transport.abort()
    return response


def full() -> web.Response:
    """As SGLang 0.5.23 says it, managers/scheduler.py: _abort_on_queued_limit."""
    return web.json_response({"error": {"message": "The request queue is full."}}, status=503)


RESPONSES: dict[str, Callable[[web.Request], Any]] = {
    "refuses: too long": refuses, "an internal error": breaks, "bytes": is_not_utf8, "half an answer": is_half,
    "no answer": hangs, "a cut connection": hangs_up}
