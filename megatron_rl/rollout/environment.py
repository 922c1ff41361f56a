"""Environments: functions that answer a model in the middle of its response, such as a tool, a game or a user.

A user writes a function of (prompt, turns so far) and names it by its dotted path in rollout.environment. The engine
stops at rollout.stop or an end-of-text token. The function reads what the model wrote and returns the text that comes
next, or None to end the episode. That text is tokenised once, by itself, and appended to the sampled tokens. It is
context, and nothing trains on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from megatron_rl.foreign import as_utf8, load_function, told
from megatron_rl.rollout.background import in_thread
from megatron_rl.types import Prompt

Environment = Callable[[Prompt, Sequence[str]], str | None]
"""(prompt, the model's turns so far, the last one last) -> what the model reads next, or None: the episode is over."""


MOST_HUNG_CALLS = 1000
CHARACTERS_PER_TOKEN = 64
"""Far more than a token of any text has. A longer answer is a fault: tokenising it would only hold everybody up."""


class EnvironmentFailed(RuntimeError):
    """The user's function raised, took too long, or returned neither a text nor None. The message names the prompt."""


def load_environment(path: str | None) -> Environment | None:
    """The function at `package.module.function`. ValueError naming rollout.environment if there is none."""
    return None if path is None else load_function("rollout.environment", path)


class EnvironmentThreads:
    """Calls the environment in at most `threads` threads.

    Further calls wait; the wait does not count as the call's time. It uses no executor, because Python waits for an
    executor's threads at its end: one that hangs would keep the run alive. Nobody can end a thread that hangs. It is
    left alone, and while MOST_HUNG_CALLS calls hang, further calls fail at once.

    longest: how many characters an answer may have.
    """

    def __init__(self, environment: Environment, *, threads: int, timeout_s: float, longest: int = 10**6):
        self._environment, self._timeout_s, self._longest = environment, timeout_s, longest
        self._hung: list[asyncio.Future] = []
        self._free = asyncio.Semaphore(threads)

    async def answer(self, prompt: Prompt, turns: Sequence[str]) -> str | None:
        """The environment's next text, or None if the episode is over. EnvironmentFailed says what went wrong."""
        where = f"rollout.environment, prompt {prompt.id!r}"
        async with self._free:
            self._hung = [call for call in self._hung if not call.done()]
            if len(self._hung) >= MOST_HUNG_CALLS:
                raise EnvironmentFailed(f"{where}: it was not called, since {len(self._hung)} earlier calls hang")
            call = in_thread(self._environment, prompt, tuple(turns), daemon=True)
            call.add_done_callback(lambda late: late.exception())  # nobody may wait for it any more
            try:
                await asyncio.wait([call], timeout=self._timeout_s)
            finally:
                if not call.done():
                    self._hung.append(call)
        if not call.done():
            raise EnvironmentFailed(f"{where}: no answer within "
                                    f"rollout.environment_timeout_s={self._timeout_s:g}")
        error = call.exception()
        if error is not None:  # the user's own code: of any kind
            raise EnvironmentFailed(f"{where}: {told(error)}") from error
        text = call.result()
        if not isinstance(text, str | None):
            raise EnvironmentFailed(f"{where}: it returned a {type(text).__name__}, not a str or None")
        if text is not None and len(text) > self._longest:
            raise EnvironmentFailed(f"{where}: it returned {len(text)} characters; {self._longest} are the most, which "
                                    f"is {CHARACTERS_PER_TOKEN} for each of rollout.max_response_tokens")
        if text is not None and not text.isascii() and as_utf8(text) != text:
            raise EnvironmentFailed(f"{where}: it returned a text that is not UTF-8: {as_utf8(text[:100])}")
        return text
