"""HTTP requests with JSON answers, and an exception for each way in which they fail.

Ignores the environment's proxies.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import orjson

from megatron_rl.observe.wires import keep_alive
from megatron_rl.rollout.background import aside

# The server drops idle connections after 5 s (SGLANG_TIMEOUT_KEEP_ALIVE); reuse none that could be closing.
KEEP_ALIVE_S = 3.0
ERROR_TEXT_CHARACTERS = 600
LARGE_ANSWERS = 4
"""How many answers of one engine are read or parsed at a time."""


class EngineHTTPError(RuntimeError):
    """The engine refused a request or did not answer. The message names the endpoint and says why."""


class RequestRefusedError(EngineHTTPError):
    """The engine says that the request itself is wrong, for example too long. No engine of the run will accept it."""


class EngineBusyError(EngineHTTPError):
    """The engine has no room for the request now, for example because its queue is full."""


class EngineUnreachableError(EngineHTTPError):
    """Nobody listens at the engine's address."""


class EngineDisconnectedError(EngineHTTPError):
    """The connection broke before the answer was complete: the engine may have died."""


REFUSALS = {400: RequestRefusedError, 413: RequestRefusedError, 422: RequestRefusedError, 429: EngineBusyError,
            503: EngineBusyError}
"""What the status of an answer says; all others: the engine failed."""


def _socket(address: tuple) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    keep_alive(made)
    return made


class JsonConnection:
    """Requests to one address. Safe for many concurrent requests on one event loop.

    The connection pool opens on first use and belongs to that loop. After close() another loop may use it.
    """

    def __init__(self, base_url: str, api_key: str | None):
        self.base_url = base_url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None
        self._large: asyncio.Semaphore  # with the session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def request(self, method: str, path: str, body: Any, *, timeout_s: float) -> Any:
        """The answer's JSON, or its text. Raises EngineHTTPError."""
        where = f"{method} {self.base_url}{path}"
        async with self._answered(where, body, timeout_s) as response:
            read = await _read_whole(where, response)
            try:
                return orjson.loads(read) if response.content_type == "application/json" else read.decode()
            except ValueError as error:  # not JSON, or not text
                raise EngineHTTPError(f"{where}: {error}; it answered {_beginning(read)!r}") from error

    async def read[T](self, method: str, path: str, body: Any, parse: Callable[[bytes], T], *, timeout_s: float) -> T:
        """parse(the answer), done beside the loop: for large answers. Raises EngineHTTPError.

        So few of them are in memory at a time as one thread can parse; the others wait in their sockets.
        """
        where = f"{method} {self.base_url}{path}"
        async with self._answered(where, body, timeout_s) as response, self._large:
            return await aside(parse, await _read_whole(where, response))

    @contextlib.asynccontextmanager
    async def _answered(self, where: str, body: Any, timeout_s: float) -> AsyncIterator[aiohttp.ClientResponse]:
        """From here on the answer comes; what breaks meanwhile gets its name."""
        method, url = where.split(" ", 1)
        try:
            async with self._open_session().request(
                method, url, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as response:
                yield response
        except TimeoutError as error:
            raise EngineHTTPError(f"{where}: no answer within {timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise EngineUnreachableError(f"{where}: {error}") from error
        except aiohttp.ClientError as error:
            raise EngineDisconnectedError(f"{where}: {type(error).__name__}: {error}") from error

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, socket_factory=_socket)
            self._large = asyncio.Semaphore(LARGE_ANSWERS)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False, headers=self._headers,
                                                  json_serialize=lambda value: orjson.dumps(value).decode())
        return self._session


async def _read_whole(where: str, response: aiohttp.ClientResponse) -> bytes:
    read = await response.read()
    if not 200 <= response.status < 300:
        raise REFUSALS.get(response.status, EngineHTTPError)(
            f"{where}: HTTP {response.status}: {_beginning(read)}")
    return read


def _beginning(read: bytes) -> str:
    return read[:ERROR_TEXT_CHARACTERS].decode(errors="replace")


@contextlib.contextmanager
def well_formed(body: bytes = b"") -> Iterator[None]:
    """An answer that is not shaped as the API says becomes an EngineHTTPError, which shows how `body` begins."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        answered = f"; it answered {_beginning(body)!r}" if body else ""
        raise EngineHTTPError(f"the engine's answer is malformed: {type(error).__name__}: {error}{answered}") from error
