"""The gateway: an HTTP server at which a session is an API key.

| path | key | what |
| --- | --- | --- |
| POST /v1/chat/completions | a session's | OpenAI, also as a stream |
| POST /v1/responses | a session's | OpenAI's other protocol, also as a stream; the whole input each time |
| POST /v1/messages | a session's | Anthropic, also as a stream |
| GET /v1/models | a session's | the one model |
| POST /sessions | the gateway's | opens a session; answers id, api_key and task, or 204 if there is none to open |
| GET /sessions/ID | its own, or the gateway's | how it stands |
| POST /sessions/ID/reward | its own, or the gateway's | {reward}: a finite number |
| POST /sessions/ID/end | its own, or the gateway's | no further request is answered; {error}: why it failed |

A request without a valid key gets 401, one for another's session 403. What an agent sends is limited before it is read.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from megatron_rl.environment.gateway import anthropic_api, openai_api, responses_api
from megatron_rl.environment.gateway.errors import RequestError
from megatron_rl.environment.gateway.messages import depth_of
from megatron_rl.environment.gateway.session import Session
from megatron_rl.rollout.ports import choose_port

DEEPEST_JSON = 64
LONGEST_FAULT = 500
BACKLOG = 256
"""Connections that wait to be accepted, and the most that one round of the event loop accepts."""
MODEL_NAME = "policy"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    body_bytes: int
    messages: int


class Gateway:
    """Listens while it is open: `async with Gateway(...) as gateway:`, or start() and close().

    open_session: gives the session that POST /sessions asks for in its body, or None; without it nothing can be opened
    from outside. key: the gateway's own, needed for that.
    """

    def __init__(self, limits: Limits, *, host: str, port: int | None = None, key: str | None = None,
                 open_session: Callable[[Mapping[str, Any]], Awaitable[Session | None]] | None = None):
        self._limits, self._host, self._port = limits, host, port
        self._key, self._open_session = key, open_session
        self._sessions: dict[bytes, Session] = {}
        self._turn = asyncio.Lock()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Gateway:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    @property
    def is_open(self) -> bool:
        return self._runner is not None and bool(self._runner.addresses)

    async def start(self) -> None:
        app = web.Application(client_max_size=self._limits.body_bytes, middlewares=[self._in_turn, _errors_as_json])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/responses", self._responses)
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/sessions", self._start_session)
        app.router.add_get("/sessions/{id}", self._tell_session)
        app.router.add_post("/sessions/{id}/reward", self._reward)
        app.router.add_post("/sessions/{id}/end", self._end)
        # a client that hangs up cancels its request, which aborts it at the engine
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        port = 0 if self._port is None else choose_port(self._port, host=self._host, key="rollout.agent.port")
        await web.TCPSite(self._runner, self._host, port, backlog=BACKLOG).start()
        self._port = self._runner.addresses[0][1]

    async def close(self) -> None:
        for session in list(self._sessions.values()):
            await self.end(session)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def admit(self, session: Session) -> None:
        """From now on the session's key opens it."""
        self._sessions[_digest(session.key)] = session

    async def end(self, session: Session) -> None:
        """Its key opens nothing any more."""
        self._sessions.pop(_digest(session.key), None)
        await session.close()

    @web.middleware
    async def _in_turn(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """One request is begun in one round of the event loop: those of a thousand agents would block it for long."""
        async with self._turn:
            await asyncio.sleep(0)
        return await handler(request)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        session, body = self._session(request), await self._body(request)
        asked = openai_api.read_request(body, max_messages=self._limits.messages)
        answered = await session.answer(asked)
        if not body.get("stream"):
            return _json(openai_api.completion(answered, MODEL_NAME))
        options = body.get("stream_options")
        usage = isinstance(options, Mapping) and options.get("include_usage") is True
        return await _streamed(request, openai_api.stream(answered, MODEL_NAME, usage=usage))

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        session, body = self._session(request), await self._body(request)
        asked = anthropic_api.read_request(body, max_messages=self._limits.messages)
        answered = await session.answer(asked)
        if not body.get("stream"):
            return _json(anthropic_api.answer(answered, MODEL_NAME))
        return await _streamed(request, anthropic_api.stream(answered, MODEL_NAME))

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        session, body = self._session(request), await self._body(request)
        answered = await session.answer(responses_api.read_request(body, max_messages=self._limits.messages))
        if not body.get("stream"):
            return _json(responses_api.response(answered, MODEL_NAME))
        return await _streamed(request, responses_api.stream(answered, MODEL_NAME))

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._session(request)
        return _json({"object": "list", "data": [
            {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "megatron_rl"}]})

    async def _start_session(self, request: web.Request) -> web.StreamResponse:
        if not self._is_own(request):
            raise RequestError("POST /sessions needs the gateway's key", status=401, code="invalid_api_key")
        session = await self._open_session(await self._body(request) if request.can_read_body else {})
        if session is None:
            return web.Response(status=204)
        self.admit(session)
        return _json({"id": session.id, "api_key": session.key, "task": session.task()})

    async def _tell_session(self, request: web.Request) -> web.StreamResponse:
        return _json(self._named(request).state())

    async def _reward(self, request: web.Request) -> web.StreamResponse:
        session, body = self._named(request), await self._body(request)
        session.give_reward(body.get("reward"))
        return _json(session.state())

    async def _end(self, request: web.Request) -> web.StreamResponse:
        session, body = self._named(request), await self._body(request) if request.can_read_body else {}
        if body.get("error") is not None:
            session.fault = str(body["error"])[:LONGEST_FAULT]
        await self.end(session)
        return _json(session.state())

    def _session(self, request: web.Request) -> Session:
        """The session whose key the request has. RequestError without one."""
        found = self._sessions.get(_digest(_key_of(request)))
        if found is None:
            raise RequestError("no valid API key: send the key of an open session in the header Authorization (Bearer "
                               "KEY) or x-api-key", status=401, code="invalid_api_key")
        return found

    def _named(self, request: web.Request) -> Session:
        """The session of the path, for itself or for who opened it."""
        wanted = request.match_info["id"]
        if self._is_own(request):
            for session in self._sessions.values():
                if session.id == wanted:
                    return session
            raise RequestError(f"no open session {wanted}", status=404, code="not_found")
        session = self._session(request)
        if session.id != wanted:
            raise RequestError("this key is another session's", status=403, code="permission_denied")
        return session

    def _is_own(self, request: web.Request) -> bool:
        return (self._key is not None and self._open_session is not None
                and _digest(_key_of(request)) == _digest(self._key))

    async def _body(self, request: web.Request) -> Mapping[str, Any]:
        """The request's JSON object. RequestError if it is too large, too deep, or none."""
        most = self._limits.body_bytes
        too_large = RequestError(f"the body is larger than {most} bytes (rollout.agent.max_body_bytes)", status=413,
                                 code="request_too_large")
        if (request.content_length or 0) > most:
            raise too_large
        try:
            body = orjson.loads(await request.read())
        except web.HTTPRequestEntityTooLarge as error:
            raise too_large from error
        except orjson.JSONDecodeError as error:
            raise RequestError(f"the body is not JSON, or too deep: {error}") from error
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object")
        if depth_of(body, DEEPEST_JSON) > DEEPEST_JSON:
            raise RequestError(f"the body's JSON is more than {DEEPEST_JSON} levels deep")
        return body


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What the agent did wrong, in the form of the protocol that it speaks."""
    try:
        return await handler(request)
    except RequestError as failure:
        form = anthropic_api if request.path.startswith("/v1/messages") else openai_api
        return _json(form.error(failure), status=failure.status)


async def _streamed(request: web.Request, events: Iterable[bytes]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    for event in events:
        await response.write(event)
    await response.write_eof()
    return response


def _json(value: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def _key_of(request: web.Request) -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" and key else request.headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    """Keys are compared by it, so that the time of a comparison tells nothing about them."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
