"""HTTP requests with JSON answers, and an exception for each way in which they fail.

Ignores the environment's proxies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import aiohttp
import orjson

# The server drops idle connections after 5 s (SGLANG_TIMEOUT_KEEP_ALIVE); reuse none that could be closing.
KEEP_ALIVE_S = 3.0
ERROR_TEXT_CHARACTERS = 600


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


class JsonConnection:
    """Requests to one address. Safe for many concurrent requests on one event loop.

    The connection pool opens on first use and belongs to that loop. After close() another loop may use it.
    """

    def __init__(self, base_url: str, api_key: str | None):
        self.base_url = base_url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def request(self, method: str, path: str, body: Any, *, timeout_s: float) -> Any:
        """The answer's JSON, or its text. Raises EngineHTTPError."""
        where = f"{method} {self.base_url}{path}"
        read = b""
        try:
            async with self._open_session().request(
                method, self.base_url + path, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as response:
                read = await response.read()
                if not 200 <= response.status < 300:
                    raise REFUSALS.get(response.status, EngineHTTPError)(
                        f"{where}: HTTP {response.status}: {_beginning(read)}")
                return orjson.loads(read) if response.content_type == "application/json" else read.decode()
        except ValueError as error:  # not JSON, or not text
            raise EngineHTTPError(f"{where}: {error}; it answered {_beginning(read)!r}") from error
        except TimeoutError as error:
            raise EngineHTTPError(f"{where}: no answer within {timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise EngineUnreachableError(f"{where}: {error}") from error
        except aiohttp.ClientError as error:
            raise EngineDisconnectedError(f"{where}: {type(error).__name__}: {error}") from error

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False, headers=self._headers)
        return self._session


def _beginning(read: bytes) -> str:
    return read[:ERROR_TEXT_CHARACTERS].decode(errors="replace")


@contextlib.contextmanager
def well_formed() -> Iterator[None]:
    """Turns an answer that does not have the shape of the API into an EngineHTTPError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise EngineHTTPError(f"the engine's answer is malformed: {type(error).__name__}: {error}") from error
