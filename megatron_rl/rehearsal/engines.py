"""Engines that are not there, on a clock that passes at once: how long sampling takes by a stated model of one engine.

An engine decodes all of its sequences together, one token each a step, up to its number of slots; others queue in the
order in which they came. A step of b sequences that hold S tokens takes

    overhead + (bytes of the weights that b tokens read + S * bytes of a token's keys and values) / memory rate

With experts, b tokens read more of the weights the more there are. Before a sequence decodes, its context is prefilled
at a fixed rate, during which the others wait, as in SGLang without chunks. While an engine is paused for new weights
nothing moves; then it prefills what its sequences held again, since their caches are of the old weights.

Letters: b sequences that decode, S tokens that they hold together.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import selectors
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_rl.config.schema import Config
from megatron_rl.model.network import Network
from megatron_rl.model.slots import count_parameters
from megatron_rl.plan.memory import ELEMENT_BYTES
from megatron_rl.types import VersionSpan

EMPTY = 1e-9
"""Tokens: less than this is rounding."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: if nothing is ready, its clock moves to the next timer.

    RuntimeError if there is no timer, because then everything waits for everything. Nothing in it may use threads.
    """

    def __init__(self):
        super().__init__(_NoWaiting(self))
        self.seconds = 0.0

    def time(self) -> float:
        return self.seconds


class _NoWaiting(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop):
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None):
        if timeout is None:
            raise RuntimeError("the simulated step stands still: every task waits for another")
        self._loop.seconds += timeout
        return []


@dataclass(frozen=True)
class EngineRates:
    """Assumptions about one engine; bytes, FLOPs and tokens per second, all of one GPU.

    matrix_share, bandwidth_share: what prefilling and decoding reach of the peaks. overhead_s: of a decoding step
    besides its bytes. gpu_memory: bytes.
    """

    flops: float = 989e12
    memory: float = 3.35e12
    matrix_share: float = 0.45
    bandwidth_share: float = 0.70
    overhead_s: float = 0.004
    gpu_memory: float = 80e9

    def stated(self) -> str:
        return (f"an engine's GPU prefills at {self.matrix_share:.0%} of {self.flops / 1e12:g} TFLOP/s and decodes at "
                f"{self.bandwidth_share:.0%} of {self.memory / 1e12:g} TB/s and {1000 * self.overhead_s:g} ms a step")


@dataclass(frozen=True)
class Decoder:
    """One engine's speed. slots: sequences that decode at a time.

    overhead_s, rate (bytes per second), token_bytes: as above. always, rest: bytes of weights that every step reads,
    and those of routed experts; chosen: the share of the experts that one token takes.
    """

    slots: int
    overhead_s: float
    rate: float
    token_bytes: float
    always: float
    rest: float
    chosen: float
    prefill_tokens_per_s: float

    def weight_seconds(self, batch: int) -> float:
        """Seconds of a step besides the keys and values."""
        return self.overhead_s + (self.always + self.rest * (1 - (1 - self.chosen) ** batch)) / self.rate

    def seconds(self, tokens: float, batch: int, held: float) -> float:
        """Seconds of `tokens` steps of `batch` sequences, which hold `held` tokens at first; each step adds `batch`."""
        per_token = self.token_bytes / self.rate
        return tokens * (self.weight_seconds(batch) + per_token * held) + per_token * batch * tokens * tokens / 2

    def tokens(self, seconds: float, batch: int, held: float) -> float:
        """The inverse of `seconds`."""
        per_token = self.token_bytes / self.rate
        first, second = self.weight_seconds(batch) + per_token * held, per_token * batch / 2
        if not second:
            return seconds / first
        return 2 * seconds / (first + math.sqrt(first * first + 4 * second * seconds))


def decoder_of(network: Network, config: Config, rates: EngineRates, mean_context: float) -> Decoder:
    """One engine of rollout.engine.tp GPUs, whose communication is not counted.

    slots: rollout.engine.max_running_requests, or as many sequences of mean_context tokens as its cache holds, which is
    rollout.engine.max_total_tokens or what mem_fraction_static leaves beside the weights. ValueError if none.
    """
    engine = config.rollout.engine
    element = ELEMENT_BYTES[engine.dtype or config.model.dtype]
    total, active = count_parameters(network)
    chosen = network.num_experts_per_tok / network.num_experts if network.num_experts else 1.0
    routed = (total - active) / (1 - chosen) if chosen < 1 else 0.0  # active = always + chosen x routed
    if network.kv_lora_rank:  # every rank has the whole latent vector (sglang/srt/mem_cache: MLATokenToKVPool)
        numbers = engine.tp * (network.kv_lora_rank + network.qk_rope_head_dim)
    else:
        numbers = 2 * max(network.num_key_value_heads, engine.tp) * network.head_dim
    token_bytes = element * network.num_hidden_layers * numbers
    room = engine.mem_fraction_static * rates.gpu_memory * engine.tp - element * total
    cache = min(room / token_bytes, math.inf if engine.max_total_tokens is None else engine.max_total_tokens)
    slots = min(engine.max_running_requests, int(cache // mean_context))
    if slots < 1:
        raise ValueError(f"rollout.engine.tp={engine.tp}, mem_fraction_static={engine.mem_fraction_static:g}: an "
                         f"engine has {max(0.0, room) / 1e9:.1f} GB beside its weights, too little for one sequence of "
                         f"{mean_context:,.0f} tokens; raise rollout.engine.tp")
    return Decoder(slots, rates.overhead_s, rates.memory * rates.bandwidth_share * engine.tp, token_bytes,
                   element * (total - routed), element * routed, chosen,
                   rates.flops * rates.matrix_share * engine.tp / (2 * active))


@dataclass
class _Request:
    context: int
    wanted: int
    prefill: int
    done: asyncio.Future
    began: float = 0.0  # the engine's count of steps at its first token
    spans: list[tuple[float, int]] = field(default_factory=list)  # (count of steps, version from there on)


class Engine:
    """steps: tokens that a sequence has got that was here from the beginning. busy_s: with any sequence; sampled."""

    def __init__(self, loop: VirtualLoop, decoder: Decoder):
        self._loop, self._decoder = loop, decoder
        self._running: list[tuple[float, int, _Request]] = []  # by the count of steps at the last token
        self._waiting: deque[_Request] = deque()
        self._steps, self._at, self._free_at = 0.0, 0.0, 0.0
        self._held = 0.0  # tokens of all running sequences less their number times `steps`
        self._timer: asyncio.TimerHandle | None = None
        self._paused, self.version, self._count = False, 0, 0
        self.busy_s = self.sampled = 0.0

    async def generate(self, context: int, wanted: int, prefill: int) -> tuple[VersionSpan, ...]:
        """Samples `wanted` tokens after `context` ones, `prefill` of them without a cache. Cancelling frees its place;
        CancelledError then has the tokens that it had sampled as `args`."""
        request = _Request(context, wanted, prefill, self._loop.create_future())
        self._waiting.append(request)
        self._change()
        try:
            return await request.done
        except asyncio.CancelledError:
            self._settle()
            sampled = max(0, int(self._steps - request.began)) if request.spans else 0
            if request in self._waiting:
                self._waiting.remove(request)
            else:
                self._running = [each for each in self._running if each[2] is not request]
                heapq.heapify(self._running)
                self._held -= request.context - request.began
            self._change()
            raise asyncio.CancelledError(sampled) from None

    def pause(self) -> None:
        self._settle()
        self._paused = True
        self._arm()

    def resume(self, version: int) -> None:
        """Goes on under the weights of `version`."""
        self._settle()
        self._paused = False
        if version != self.version:
            self.version = version
            self._stall(self._held + len(self._running) * self._steps)
            for _, _, request in self._running:
                request.spans.append((self._steps, version))
        self._change()

    def _stall(self, tokens: float) -> None:
        """Prefilling: nothing decodes until it is over."""
        self._free_at = max(self._free_at, self._loop.seconds) + tokens / self._decoder.prefill_tokens_per_s

    def _settle(self) -> None:
        """Brings `steps` up to the present."""
        now = self._loop.seconds
        if self._running and not self._paused:
            self.busy_s += now - self._at
            batch = len(self._running)
            gone = self._decoder.tokens(max(0.0, now - max(self._at, self._free_at)), batch,
                                        self._held + batch * self._steps)
            self._steps += gone
            self.sampled += gone * batch
        self._at = now

    def _change(self) -> None:
        """Takes in who waits, ends who is done, and sets the clock for the next one."""
        self._settle()
        while self._running and self._running[0][0] <= self._steps + EMPTY:
            _, _, request = heapq.heappop(self._running)
            self._held -= request.context - request.began
            if not request.done.done():
                request.done.set_result(_spans(request))
        while self._waiting and len(self._running) < self._decoder.slots and not self._paused:
            request = self._waiting.popleft()
            self._stall(request.prefill)
            request.began = self._steps
            request.spans.append((self._steps, self.version))
            self._held += request.context - self._steps
            self._count += 1
            heapq.heappush(self._running, (self._steps + request.wanted, self._count, request))
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running and not self._paused:
            batch = len(self._running)
            left = self._decoder.seconds(max(0.0, self._running[0][0] - self._steps), batch,
                                         self._held + batch * self._steps)
            self._timer = self._loop.call_at(max(self._loop.seconds, self._free_at) + left, self._due)

    def _due(self) -> None:
        self._timer = None
        self._settle()
        self._steps = max(self._steps, self._running[0][0])
        self._change()


def _spans(request: _Request) -> tuple[VersionSpan, ...]:
    """Which version sampled which of its tokens; a step that a publish cut belongs to the version before it."""
    starts = [*(math.ceil(begin - request.began - EMPTY) for begin, _ in request.spans), request.wanted]
    return tuple(VersionSpan(version, start, end) for (_, version), start, end in
                 zip(request.spans, starts, starts[1:], strict=False) if end > start)


class Engines:
    """All engines; a request goes to the one with the fewest, as in rollout.fleet, under rollout.concurrency."""

    def __init__(self, loop: VirtualLoop, decoder: Decoder, count: int, concurrency: int):
        self.engines = [Engine(loop, decoder) for _ in range(count)]
        self._load = [0] * count
        self._least = [(0, place) for place in range(count)]
        self._slots = asyncio.Semaphore(concurrency)

    async def generate(self, context: int, wanted: int, prefill: int) -> tuple[VersionSpan, ...]:
        async with self._slots:
            place = self._choose()
            try:
                return await self.engines[place].generate(context, wanted, prefill)
            finally:
                self._load[place] -= 1
                heapq.heappush(self._least, (self._load[place], place))

    def _choose(self) -> int:
        while True:
            load, place = heapq.heappop(self._least)
            if load == self._load[place]:
                break
        self._load[place] += 1
        heapq.heappush(self._least, (self._load[place], place))
        return place

    def pause(self) -> None:
        for engine in self.engines:
            engine.pause()

    def resume(self, version: int) -> None:
        for engine in self.engines:
            engine.resume(version)

    @property
    def version(self) -> int:
        return self.engines[0].version

    def totals(self) -> tuple[float, float]:
        """(seconds with any sequence, summed over engines; tokens sampled)."""
        return _sum(engine.busy_s for engine in self.engines), _sum(engine.sampled for engine in self.engines)


def _sum(values) -> float:
    return math.fsum(values)


__all__: Sequence[str] = ("Decoder", "EngineRates", "Engines", "VirtualLoop", "decoder_of")
