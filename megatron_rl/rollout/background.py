"""Threads beside the caller's: an event loop, so that requests go on while the caller waits, and single calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any


class EventLoopThread:
    """`with EventLoopThread() as background:` then submit() or run() coroutines from any other thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)

    def __enter__(self) -> EventLoopThread:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Cancels what still runs, lets it clean up, and ends the thread."""
        self.cancel_all()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The coroutine's result. A caller that is interrupted cancels it."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def cancel_all(self) -> None:
        """Returns once everything that ran has cleaned up."""
        self.run(_cancel_others())


def in_thread(call: Callable[..., Any], *args: Any, daemon: bool) -> asyncio.Future:
    """As asyncio.to_thread, in a thread of its own that nobody waits for when its result is not wanted any more.

    daemon: not even Python, when it ends.
    """
    future: Future = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:  # noqa: BLE001 -- handed on to whoever waits
            future.set_exception(error)

    threading.Thread(target=work, daemon=daemon).start()
    return asyncio.wrap_future(future)


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
