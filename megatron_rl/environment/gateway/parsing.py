"""Sampled text -> what the agent gets: content, reasoning, calls. Token ids have no part in it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

WORKER = "megatron_rl.environment.gateway.parsing_worker"
LONGEST_LINE = 1 << 26


@dataclass(frozen=True)
class Parsed:
    """calls: (name, arguments as a JSON text). error: why parsing failed; content then is the whole text."""

    content: str
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    error: str | None = None


class Parser:
    """SGLang's parsers by their names there, in a process of their own, which is started at first use.

    Without names nothing is parsed and no process is started.
    """

    def __init__(self, tool_call_parser: str | None, reasoning_parser: str | None):
        self._tool, self._reasoning = tool_call_parser, reasoning_parser
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()

    @property
    def parses(self) -> bool:
        return self._tool is not None or self._reasoning is not None

    async def start(self) -> None:
        """ValueError for a name that SGLang does not know."""
        if not self.parses or (self._process is not None and self._process.returncode is None):
            return
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", WORKER, self._tool or "", self._reasoning or "", limit=LONGEST_LINE,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
        line = await self._process.stdout.readline()
        if not line:
            raise ValueError("rollout.agent.tool_call_parser: SGLang's parsers cannot be imported; try `python -m "
                             f"{WORKER}`")
        for key, chosen in (("tool_call_parser", self._tool), ("reasoning_parser", self._reasoning)):
            known = orjson.loads(line)[key]
            if chosen is not None and chosen not in known:
                await self.close()
                raise ValueError(f"rollout.agent.{key}={chosen} is none of SGLang's: {', '.join(known)}")

    async def parse(self, text: str, tools: Sequence[Mapping[str, Any]], *, opened: bool) -> Parsed:
        """opened: the prompt ends with <think>, so that the text begins inside the reasoning."""
        if not self.parses:
            return Parsed(text)
        asked = orjson.dumps({"text": text, "tools": list(tools), "opened": opened}) + b"\n"
        try:
            answer = orjson.loads(await asyncio.shield(self._ask(asked)))  # whoever gives up leaves no answer unread
        except (ConnectionError, orjson.JSONDecodeError, ValueError) as error:
            return Parsed(text, error=f"the parsing process failed: {error}")
        if "error" in answer:
            return Parsed(text, error=answer["error"])
        return Parsed(answer["content"], answer["reasoning"], tuple(map(tuple, answer["calls"])))

    async def _ask(self, asked: bytes) -> bytes:
        async with self._one_at_a_time:
            await self.start()
            self._process.stdin.write(asked)
            await self._process.stdin.drain()
            return await self._process.stdout.readline()

    async def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._process = None
