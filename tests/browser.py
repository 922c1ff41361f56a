"""A real headless Chromium, spoken to by its DevTools protocol: what a reader sees of a page, what the console says.

Needs Chromium (Debian: apt-get install chromium); `needs_browser` skips where there is none.
"""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START_S = LOAD_S = 240.0

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")


@dataclass
class Visit:
    """value: what the script returned; errors: what the console shows in red; screenshot: PNG of the whole page."""

    value: Any = None
    errors: list[str] = field(default_factory=list)
    screenshot: bytes = b""


class Browser:
    def __init__(self, port: int):
        self._port = port

    def visit(self, page: Path, script: str, *, width: int, height: int = 900, dark: bool = False,
              screenshot: bool = False) -> Visit:
        """Open the file in a window of so many CSS pixels, then evaluate the expression (a promise is awaited)."""
        return asyncio.run(asyncio.wait_for(self._visit(page, script, width, height, dark, screenshot), LOAD_S))

    async def _visit(self, page, script, width, height, dark, screenshot) -> Visit:
        root = f"http://127.0.0.1:{self._port}/json"
        async with aiohttp.ClientSession() as http:
            async with http.put(f"{root}/new?about:blank") as response:
                target = await response.json()
            async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Page.setLifecycleEventsEnabled", enabled=True)
                await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                               mobile=False)
                scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                await tab.call("Emulation.setEmulatedMedia", features=[scheme])
                document = await tab.call("Page.navigate", url=page.resolve().as_uri())
                await tab.loaded(document["loaderId"])
                done = await tab.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
                visit = Visit(done["result"].get("value"))
                if "exceptionDetails" in done:
                    raise RuntimeError(f"the test's own script failed: {done['exceptionDetails']}")
                if screenshot:
                    image = await tab.call("Page.captureScreenshot", captureBeyondViewport=True)
                    visit.screenshot = base64.b64decode(image["data"])
                visit.errors = tab.errors
            await http.get(f"{root}/close/{target['id']}")
        return visit


class Tab:
    """Commands and their answers on one page's socket; on the way, what went wrong on the page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._last, self._loaded = socket, 0, set()
        self.errors: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": parameters})
        while (message := await self._next()).get("id") != self._last:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    async def loaded(self, loader: str) -> None:
        """Returns once that document is loaded.

        The tab's first document, about:blank, may still be loading when the tab is asked for this one.
        """
        while loader not in self._loaded:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message = await self._socket.receive_json()
        method, about = message.get("method"), message.get("params", {})
        if method == "Page.lifecycleEvent" and about["name"] == "load":
            self._loaded.add(about["loaderId"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.errors.append(str([argument.get("value") for argument in about["args"]]))
        elif method == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(about["entry"]["text"])
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Chromium with a profile of its own, gone afterwards. Without its sandbox, which root may not use."""
    process = subprocess.Popen(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    try:
        told, deadline = profile / "DevToolsActivePort", time.monotonic() + START_S
        while not (told.exists() and told.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < deadline, f"{CHROMIUM} did not start"
            time.sleep(0.05)
        yield Browser(int(told.read_text().split()[0]))
    finally:
        process.terminate()
        process.wait(120)
