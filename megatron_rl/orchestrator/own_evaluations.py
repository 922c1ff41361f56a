"""eval.functions: evaluations of the user's own, which ask the served weights what they like."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
from collections.abc import Awaitable, Callable

from megatron_rl.config.schema import EvalConfig
from megatron_rl.foreign import load_function, told
from megatron_rl.observe.own import own_numbers
from megatron_rl.rollout.responses import Responder, SamplingPlan, Ticket, all_or_none
from megatron_rl.rollout.transcript import Transcript
from megatron_rl.types import Prompt

__all__ = ["asker", "check_evaluations", "own_evaluations"]

_LOG = logging.getLogger(__name__)

Ask = Callable[..., Awaitable[list[str]]]
"""ask(text, n=1) -> n responses of the served weights to a prompt that is tokenised as it is."""


def check_evaluations(options: EvalConfig) -> None:
    """ValueError for a function that is not there, or is not async."""
    for path in options.functions:
        if not inspect.iscoroutinefunction(load_function("eval.functions", path)):
            raise ValueError(f"eval.functions={path} is not async: write `async def`, since it waits for the engines")


async def own_evaluations(options: EvalConfig, step: int, ask: Callable[[str], Ask]) -> dict[str, float]:
    """own/<name> -> number, of all functions. ask: makes what one function asks with, from its path.

    A function that raises, returns nonsense or takes longer than eval.function_timeout_s costs its own numbers and a
    warning.
    """
    found: dict[str, float] = {}
    for path in options.functions:
        limit = asyncio.timeout(options.function_timeout_s)
        try:
            async with limit:
                returned = await load_function("eval.functions", path)(ask(path), step)
            found |= own_numbers(returned, found)
        except Exception as error:  # noqa: BLE001 -- the user's code raises what it likes
            why = f"eval.function_timeout_s={options.function_timeout_s:g} is over" if limit.expired() else told(error)
            _LOG.warning("eval.functions: %s gave no numbers after step %d: %s", path, step, why)
    return {f"own/{name}": value for name, value in found.items()}


def asker(responder: Responder, tokenizer, plan: SamplingPlan, path: str, step: int) -> Ask:
    """Each question of a function has its own seeds."""
    questions = itertools.count()

    async def ask(text: str, n: int = 1) -> list[str]:
        token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        prompt, index = Prompt(path, token_ids, text, "", "own"), next(questions)
        responder.check_length(prompt, plan)
        transcripts = await all_or_none([asyncio.create_task(responder.sample(
            Ticket(prompt, f"eval-{path}", step, index, each), plan, Transcript(), plan.max_response_tokens))
            for each in range(n)])
        return [tokenizer.decode(each.token_ids, skip_special_tokens=True) for each in transcripts]

    return ask
