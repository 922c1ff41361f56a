"""Two things that an event loop needs beside its tasks: calls in threads of their own, and an end to all that runs."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def in_thread(call: Callable[..., Any], *args: Any, daemon: bool) -> asyncio.Future:
    """Like asyncio.to_thread, but in a thread of its own.

    If the result is no longer wanted, nobody waits for the thread.
    daemon: not even Python waits for it at its end.
    """
    future: Future = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(call(*args))
        except StopIteration as error:  # a future of asyncio takes none, and would never be done
            future.set_exception(RuntimeError(f"StopIteration: {error}"))
        except BaseException as error:  # noqa: BLE001 -- handed on to whoever waits
            future.set_exception(error)

    threading.Thread(target=work, daemon=daemon).start()
    return asyncio.wrap_future(future)


_BESIDE = ThreadPoolExecutor(1, thread_name_prefix="beside-the-loop")


async def aside[T](call: Callable[..., T], *args: Any, **options: Any) -> T:
    """call(...) in the one thread that works beside the loop, after what it was given before.

    One, because each thread that computes keeps the loop from the interpreter for up to sys.getswitchinterval().
    """
    return await asyncio.get_running_loop().run_in_executor(_BESIDE, functools.partial(call, *args, **options))


async def cancel_others(but: asyncio.Task | None = None) -> None:
    """Cancels every other task of this loop, except `but`, and waits until they have cleaned up."""
    others = [task for task in asyncio.all_tasks() if task not in (asyncio.current_task(), but)]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
