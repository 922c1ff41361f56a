"""One agent's conversation with the model: requests in, turns of a tree out."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_rl.environment.gateway.errors import RequestError
from megatron_rl.environment.gateway.messages import Message, chain, extended, read_arguments
from megatron_rl.environment.gateway.parsing import Parsed, Parser
from megatron_rl.environment.gateway.probe import Findings
from megatron_rl.environment.gateway.rendering import Options, Rendering
from megatron_rl.environment.gateway.tree import Tree, Turn
from megatron_rl.rollout.fleet import Fleet, FleetError, Tally
from megatron_rl.rollout.responses import SamplingPlan, Ticket, sampling_seed
from megatron_rl.rollout.sampling import GenerateResult, SamplingParams
from megatron_rl.types import Finish

THINKING_OPENS = "<think>"


@dataclass(frozen=True)
class Asked:
    """One request, whatever protocol it came in. max_tokens None: as many as there is room for."""

    messages: Sequence[Message]
    options: Options = Options()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answered:
    """parsed: what the agent reads. prompt_tokens: all that the model read for this turn."""

    turn: Turn
    parsed: Parsed
    prompt_tokens: int

    @property
    def finish_reason(self) -> str:
        if self.turn.result.finish is Finish.LENGTH:
            return "length"
        return "tool_calls" if self.parsed.calls else "stop"


@dataclass(frozen=True)
class Model:
    """What all sessions share: the engines, and how messages become token ids and token ids messages."""

    fleet: Fleet
    rendering: Rendering
    findings: Findings
    parser: Parser
    seed: int
    max_context_tokens: int


@dataclass
class Session:
    """One sample of one prompt. key: the API key that is this session.

    cut: the agent wanted more than there was room for. failure: an engine's, after which no request is answered.
    unparsed: turns whose calls or reasoning the parsers could not read. taken: an environment server has fetched it.
    ended: no further request is answered. fault: what an environment server says went wrong.
    """

    model: Model
    ticket: Ticket
    plan: SamplingPlan
    tally: Tally
    key: str = field(default_factory=lambda: f"sk-{secrets.token_urlsafe(32)}", repr=False)
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    tree: Tree = field(default_factory=Tree)
    reward: float | None = None
    cut: bool = False
    failure: FleetError | None = None
    unparsed: int = 0
    fault: str | None = None
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    requests: int = 0
    _siblings: dict[bytes, int] = field(default_factory=dict)
    _running: set[asyncio.Task] = field(default_factory=set)

    def give_reward(self, reward: Any) -> None:
        """RequestError unless it is a finite number."""
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
            raise RequestError("reward must be a finite number")
        self.reward = float(reward)

    async def close(self) -> None:
        """No further request is answered; those under way are aborted."""
        self.ended.set()
        running = list(self._running)
        for work in running:
            if not work.cancelling():
                work.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def answer(self, asked: Asked) -> Answered:
        """The next turn. RequestError for what the agent did wrong; an engine's failure is a RequestError of 503."""
        if self.ended.is_set():
            raise _ended()
        if self.failure is not None:
            raise _unavailable(self.failure)
        work = asyncio.create_task(self._answer(asked))  # of its own: whoever hangs up twice cancels it once
        self._running.add(work)
        work.add_done_callback(self._finished)
        try:
            return await asyncio.shield(work)
        except FleetError as failure:
            self.failure = failure
            raise _unavailable(failure) from failure
        except asyncio.CancelledError:
            if work.cancelled():
                raise _ended() from None
            work.cancel()
            raise

    def _finished(self, work: asyncio.Task) -> None:
        self._running.discard(work)
        if not work.cancelled():
            work.exception()  # told to whoever waited, if anybody still does

    async def _answer(self, asked: Asked) -> Answered:
        self._check_supported(asked)
        digests = chain(asked.options.shared(), asked.messages)
        parent, known = self.tree.deepest(digests, asked.messages)
        new = asked.messages[known:]
        if any(message["role"] == "assistant" for message in new):  # answers that are not ours, or were changed
            parent, new = None, asked.messages
            self.tree.misses += 1
        rendering = self.model.rendering
        text = (rendering.render(new, asked.options) if parent is None
                else rendering.after(new, asked.options, end=parent.end))
        given = rendering.encode(text)
        read = [*(parent.token_ids() if parent is not None else ()), *given]
        result = await self._sample(read, asked, self._room(parent, given), digests[-1])
        parsed = await self._parse(result, asked.options, opened=text.rstrip().endswith(THINKING_OPENS))
        answer = as_message(parsed)
        turn = Turn.after(parent, given, result, answer=answer, history=extended(digests[-1], answer),
                          end=rendering.end_of_turn(result.output_ids))
        self.tree.add(turn)
        return Answered(turn, parsed, len(read))

    def _check_supported(self, asked: Asked) -> None:
        """RequestError for what the probe found that the template cannot render."""
        if asked.messages[-1]["role"] == "assistant":
            raise RequestError("the last message is an assistant's: the model answers users and tools")
        if asked.stop and self.plan.slices is not None:
            raise RequestError(f"stop={list(asked.stop)} with rollout.collector=partial: a stop text that a slice cuts "
                               "in two would not be seen; leave it out", code="unsupported_parameter")
        cannot = self.model.findings.unsupported
        used = {"system": any(message["role"] == "system" for message in asked.messages),
                "tools": bool(asked.options.tools) or any(message["role"] == "tool" for message in asked.messages)}
        for what, is_used in used.items():
            if is_used and what in cannot:
                raise RequestError(f"this model's chat template cannot render {what}: {cannot[what]}")

    def _room(self, parent: Turn | None, given: Sequence[int]) -> int:
        """Tokens that the next turn may have, at least one. RequestError, and `cut`, if there are none."""
        prompt = len(given) if parent is None else len(parent.path()[0].given)
        used = len(given) + (0 if parent is None else parent.tokens)
        by_context = self.model.max_context_tokens - used
        by_response = self.plan.max_response_tokens - (used - prompt)
        if min(by_context, by_response) > 0:
            return min(by_context, by_response)
        self.cut = True
        limit = (f"rollout.max_context_tokens={self.model.max_context_tokens}" if by_context <= by_response
                 else f"rollout.max_response_tokens={self.plan.max_response_tokens}, which counts all after the prompt")
        raise RequestError(f"no room for an answer: the conversation has {used} tokens, {used - prompt} of them after "
                           f"its first request; the limit is {limit}", code="context_length_exceeded")

    async def _sample(self, read: Sequence[int], asked: Asked, room: int, history: bytes) -> GenerateResult:
        ticket, retry = self.ticket, self._siblings.get(history, 0)
        self._siblings[history] = retry + 1
        self.requests += 1
        sampling = SamplingParams(
            temperature=self.plan.temperature, top_p=self.plan.top_p,
            max_new_tokens=min(room, asked.max_tokens or room), stop=(*self.plan.stop, *asked.stop),
            seed=sampling_seed(self.model.seed, f"{ticket.tag}/{history.hex()}/{retry}", ticket.step, ticket.index,
                               ticket.sample),
            stop_token_ids=self.model.rendering.stop_token_ids)
        generate = (self.model.fleet.generate if self.plan.slices is None
                    else partial(self.plan.slices.generate, self.model.fleet))
        result = await generate(read, rid=f"{ticket.rid}-{self.id}-{self.requests}", sampling=sampling,
                                tally=self.tally, routed_layers=self.plan.routed_layers)
        self.cut = self.cut or (result.finish is Finish.LENGTH and len(result.output_ids) == room)
        return result

    async def _parse(self, result: GenerateResult, options: Options, *, opened: bool) -> Parsed:
        rendering, tokens = self.model.rendering, result.output_ids.tolist()
        if rendering.end_of_turn(tokens):
            tokens.pop()
        text = rendering.decode(tokens, with_special=self.model.parser.parses)
        matched = result.finish_detail.get("matched")
        if isinstance(matched, str):
            text = text[:text.rfind(matched)] if matched in text else text
        parsed = await self.model.parser.parse(text, options.tools, opened=opened)
        if parsed.error is not None:
            self.unparsed += 1
        return parsed

    @property
    def waited_s(self) -> float:
        """How long it has waited for later steps, which is not the agent's time."""
        return 0.0 if self.plan.slices is None else self.plan.slices.waited_s

    def task(self) -> dict[str, Any]:
        """What an agent is told of its prompt."""
        prompt = self.ticket.prompt
        return {"id": prompt.id, "text": prompt.text, "answer": prompt.answer, "domain": prompt.domain,
                "metadata": dict(prompt.metadata), "sample": self.ticket.sample}

    def state(self) -> dict[str, Any]:
        """What GET /sessions/<id> tells."""
        return {"id": self.id, "prompt_id": self.ticket.prompt.id, "sample": self.ticket.sample,
                "turns": len(self.tree.turns), "misses": self.tree.misses, "unparsed": self.unparsed,
                "reward": self.reward, "closed": self.ended.is_set(),
                "sampled_tokens": sum(len(turn.result.output_ids) for turn in self.tree.turns)}


def as_message(parsed: Parsed) -> Message:
    """The answer as the agent gets it and sends it back. Ids of calls are drawn here."""
    message: Message = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    if parsed.calls:
        message["tool_calls"] = [
            {"id": f"call_{secrets.token_hex(12)}", "type": "function",
             "function": {"name": name, "arguments": read_arguments(arguments)}} for name, arguments in parsed.calls]
    return message


def _ended() -> RequestError:
    return RequestError("this session has ended", status=409, code="session_ended")


def _unavailable(failure: FleetError) -> RequestError:
    return RequestError(f"no engine could answer: {failure}", status=503, code="engine_unavailable")
