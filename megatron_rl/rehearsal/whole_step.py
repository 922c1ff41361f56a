"""The whole RL step, rollouts included: the run's own loop and collectors on a clock that passes at once.

loop.orchestrate, rollout.collectors and batch.BudgetFill are the run's. Stand-ins take the place of what they ask for:
engines by a stated model (engines.py), a trainer whose seconds were rehearsed, a publish that takes the weights' bytes
over one link, and a judge who takes no time. Responses draw their lengths from `records.Lengths`, each one its own:
lengths of one prompt are not alike here, and none depends on the weights.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_rl.batch import BudgetFill
from megatron_rl.config.check import check_rl
from megatron_rl.config.schema import Config
from megatron_rl.loop import orchestrate
from megatron_rl.model.network import Network
from megatron_rl.model.slots import count_parameters
from megatron_rl.observe.timing import Timers
from megatron_rl.orchestrator.serving import build_collector
from megatron_rl.plan.memory import ELEMENT_BYTES
from megatron_rl.rehearsal.engines import Decoder, EngineRates, Engines, VirtualLoop, decoder_of
from megatron_rl.rehearsal.records import Lengths
from megatron_rl.rehearsal.roofline import Rates
from megatron_rl.rollout.collectors import Ledger
from megatron_rl.rollout.fleet import Tally
from megatron_rl.rollout.responses import Judged, Ticket, as_group
from megatron_rl.rollout.transcript import Transcript, joined
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score, VersionSpan

STEPS, WARM_UP = 6, 3
"""Steps that are simulated, and how many of them come before the measured ones: `async` and `partial` first fill up."""
COLLECTORS = ("sync", "budgeted", "partial", "async")


@dataclass(frozen=True)
class Step:
    """One step, in seconds and tokens. rollout: the trainer waits for responses; trained: response tokens.

    staleness: of each trained token the versions that it is old, on average, and of the oldest. rounds: of collecting.
    """

    seconds: float
    rollout: float
    train: float
    publish: float
    generated: float
    trained: float
    dropped: float
    staleness: float
    oldest: int
    rounds: int
    engine_busy: float


def variants(config: Config) -> list[Config]:
    """`config` with each collector and what that collector needs, engines on the ranks' GPUs and apart from them.

    `budgeted` needs a budget and whole groups first in the order. Those that train on older tokens need a correction of
    the mismatch (algo.mismatch=icepop unless one is set). `async` needs engines apart.
    """
    found = []
    for collector, colocate in itertools.product(COLLECTORS, (True, False)):
        algo, stale = config.algo, collector in ("partial", "async")
        if (collector == "async" and colocate) or (collector == "budgeted" and not algo.has_budget):
            continue
        algo = dataclasses.replace(algo, order="groups" if collector == "budgeted" else algo.order,
                                   mismatch="icepop" if stale and not algo.corrects_mismatch else algo.mismatch)
        rollout = config.rollout
        rollout = dataclasses.replace(
            rollout, collector=collector, engine=dataclasses.replace(rollout.engine, colocate=colocate),
            publish="tensor" if colocate else "broadcast", max_staleness=max(1, rollout.max_staleness))
        variant = dataclasses.replace(config, algo=algo, rollout=rollout)
        check_rl(variant, None)
        found.append(variant)
    return found


class _Responder:
    """What collectors ask of rollout.responses.Responder. Response k of prompt p always has the same length."""

    def __init__(self, config: Config, engines: Engines, lengths: np.ndarray, prompt_tokens: int):
        rollout = config.rollout
        self.plan: Any = SimpleNamespace(samples_per_prompt=rollout.responses_per_prompt,
                                         max_response_tokens=rollout.max_response_tokens)
        self.tally = Tally()
        self._engines, self._lengths, self._prompt_tokens = engines, lengths, prompt_tokens
        self._verdicts = itertools.cycle((True, False))
        self._cached: dict[str, int] = {}  # request -> the version of the weights that its engine's cache is of

    def apart(self) -> _Responder:
        other = copy.copy(self)
        other.tally = Tally()
        return other

    def check_length(self, prompt: Prompt, plan: Any) -> None:
        pass

    def tickets(self, prompt: Prompt, *, step: int, index: int) -> list[Ticket]:
        return [Ticket(prompt, "train", step, index, sample) for sample in range(self.plan.samples_per_prompt)]

    async def groups(self, prompts: Sequence[Prompt], *, step: int, first_index: int) -> list[RolloutGroup]:
        return await asyncio.gather(*(self._group(prompt, step, first_index + place)
                                      for place, prompt in enumerate(prompts)))

    async def _group(self, prompt: Prompt, step: int, index: int) -> RolloutGroup:
        return as_group(prompt, await asyncio.gather(*(
            self.respond(ticket, self.plan) for ticket in self.tickets(prompt, step=step, index=index))))

    async def respond(self, ticket: Ticket, plan: Any) -> Judged:
        return await self.judge(ticket.prompt, await self.sample(ticket, plan, Transcript(), plan.max_response_tokens))

    async def sample(self, ticket: Ticket, plan: Any, so_far: Transcript, max_tokens: int) -> Transcript:
        had = len(so_far.token_ids)
        whole = self._length(ticket)
        wanted = min(max_tokens, whole - had)
        context = self._prompt_tokens + had
        cached = had and self._cached.get(ticket.rid) == self._engines.version
        try:
            spans = await self._engines.generate(context, wanted, 0 if cached else context)
        except asyncio.CancelledError as error:
            self.tally.delivered_tokens += sum(error.args)
            raise
        self.tally.delivered_tokens += wanted
        self._cached[ticket.rid] = spans[-1].version
        ended = had + wanted == whole
        if ended:
            del self._cached[ticket.rid]
        finish = None if not ended else Finish.LENGTH if whole == plan.max_response_tokens else Finish.STOP
        versions = joined(so_far.weight_versions, tuple(
            VersionSpan(span.version, had + span.start, had + span.end) for span in spans))
        count = had + wanted
        return Transcript(_all(0, np.int32, count), _all(True, np.bool_, count), _all(0, np.float32, count), versions,
                          finish)

    async def judge(self, prompt: Prompt, transcript: Transcript) -> Judged:
        rollout = Rollout(transcript.token_ids, transcript.sampled, transcript.logprobs, transcript.finish,
                          transcript.weight_versions)
        right = next(self._verdicts)  # by turns, so that hardly any group is left out
        return Judged(rollout, "", Score(float(right), "correct" if right else "wrong"))

    def _length(self, ticket: Ticket) -> int:
        place = int(ticket.prompt.id) * self.plan.samples_per_prompt + ticket.sample
        return int(self._lengths[place % len(self._lengths)])


def _all(value: Any, dtype: type, count: int) -> np.ndarray:
    """`count` times the same, in the memory of one."""
    return np.broadcast_to(np.asarray(value, dtype), count)


class _Prompts:
    def __init__(self) -> None:
        self._drawn = 0

    def next(self, n: int) -> list[Prompt]:
        first, self._drawn = self._drawn, self._drawn + n
        return [Prompt(str(place), (), "", "", "") for place in range(first, first + n)]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]


class _Cluster:
    """loop.Rollouts, Ranks, Weights and Record at once: they share the clock and the engines."""

    steps_done = 0

    def __init__(self, config: Config, clock: VirtualLoop, engines: Engines, responder: _Responder, *,
                 train_s_per_token: float, publish_s: float):
        self._config, self._clock, self._engines = config, clock, engines
        self._fill = BudgetFill(config.algo, config.parallel.dp, config.rollout.max_response_tokens)
        self._collector = build_collector(config, responder, _Prompts())
        self._train_s_per_token, self._publish_s = train_s_per_token, publish_s
        self.steps: list[Step] = []
        self._begun = self._train_seconds = 0.0
        self._trains_on = 0

    async def offer(self, step: int, timers: Timers) -> dict[str, Any]:
        """As orchestrator.rollouts.collect_budget: rounds until the budget is full, or as algo.underfull says."""
        self._begun, before = self._clock.seconds, self._engines.totals()
        algo, groups, ledger = self._config.algo, [], None
        for round_ in range(algo.max_collect_rounds):
            more, account = await self._collector.collect(step, round_)
            groups, ledger = groups + more, account if ledger is None else ledger.then(account)
            if groups and (self._full(groups) or algo.underfull != "collect_more"):
                break
        else:
            raise ValueError(f"rollout.collector={self._config.rollout.collector}: step {step} is not filled after "
                             f"algo.max_collect_rounds={algo.max_collect_rounds} rounds of these lengths; raise "
                             "rollout.prompts_per_step")
        if self._config.rollout.engine.colocate:
            self._engines.pause()
        self._trains_on = self._trained(groups)
        return {"groups": groups, "ledger": ledger, "rounds": round_ + 1, "before": before, "version": step,
                "rollout": self._clock.seconds - self._begun}

    def _offered(self, groups: Sequence[RolloutGroup]) -> list[int]:
        return [tokens for group in groups for tokens in self._fill.usable_tokens(group.rollouts, group.scores)]

    def _full(self, groups: Sequence[RolloutGroup]) -> bool:
        algo = self._config.algo
        if not algo.has_budget:
            return True
        return sum(self._offered(groups)) >= self._fill.tokens

    async def train(self, step: int, timers: Timers) -> list[Any]:
        began = self._clock.seconds
        await asyncio.sleep(self._train_s_per_token * self._trains_on)
        self._train_seconds = self._clock.seconds - began
        return []

    async def save(self, step: int, *, over: bool) -> None:
        pass

    async def publish(self, version: int) -> None:
        if version:
            self._engines.pause()
            await asyncio.sleep(self._publish_s)
        self._engines.resume(version)

    async def evaluate(self, step: int, label: str) -> None:
        pass

    def over(self, step: int) -> bool:
        return step == self._config.run.steps

    def stop_asked(self) -> bool:
        return False

    def _trained(self, groups: Sequence[RolloutGroup]) -> int:
        offered = sum(self._offered(groups))
        return min(offered, self._fill.tokens) if self._config.algo.has_budget else offered

    def step(self, step: int, offered: dict[str, Any], results: Sequence[Any], timers: Timers) -> None:
        busy, sampled = (after - before for after, before in zip(self._engines.totals(), offered["before"],
                                                                 strict=True))
        seconds, ledger = self._clock.seconds - self._begun, offered["ledger"]
        assert isinstance(ledger, Ledger)
        ages = [(offered["version"] - span.version, span.end - span.start) for group in offered["groups"]
                for rollout in group.rollouts for span in rollout.weight_versions]
        self.steps.append(Step(
            seconds, offered["rollout"], self._train_seconds, self._publish_s, sampled,
            self._trains_on, ledger.dropped_tokens,
            sum(age * tokens for age, tokens in ages) / sum(tokens for _, tokens in ages), max(age for age, _ in ages),
            offered["rounds"], busy / (seconds * len(self._engines.engines))))


def simulate_steps(config: Config, decoder: Decoder, engines: int, lengths: Lengths, *, train_s_per_token: float,
                   publish_s: float, steps: int = STEPS) -> list[Step]:
    """The first `steps` steps of the run with rollout.collector. The same lengths for every collector.

    With lengths.steps, the responses to the prompts of one step after the other have the lengths of these.
    """
    rollout = config.rollout
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=steps))
    responses = rollout.prompts_per_step * rollout.responses_per_prompt
    drawn = np.concatenate([
        each.draw(responses if lengths.steps else max(8192, responses), rollout.max_response_tokens,
                  seed=config.run.seed + place) for place, each in enumerate(lengths.steps or [lengths])])
    clock = VirtualLoop()
    try:
        fleet = Engines(clock, decoder, engines, rollout.concurrency)
        cluster = _Cluster(config, clock, fleet, _Responder(config, fleet, drawn, prompt_tokens(config)),
                           train_s_per_token=train_s_per_token, publish_s=publish_s)
        clock.run_until_complete(orchestrate(config, rollouts=cluster, ranks=cluster, weights=cluster, record=cluster,
                                             timers=Timers(), first_step=0, evaluated=True))
    finally:
        clock.close()
    return cluster.steps


def engine_of(network: Network, config: Config, lengths: Lengths, rates: EngineRates) -> Decoder:
    """ValueError if it has no room for a sequence of the mean length."""
    mean = float(np.mean(lengths.draw(4096, config.rollout.max_response_tokens)))
    return decoder_of(network, config, rates, prompt_tokens(config) + mean)


def prompt_tokens(config: Config) -> int:
    """Half of the prompt's room, as `plan` takes it."""
    return (config.rollout.max_context_tokens - config.rollout.max_response_tokens) // 2


def publish_seconds(config: Config, network: Network, rates: Rates) -> float:
    """All weights once over one link: NVLink if engines share the ranks' GPUs, else the network."""
    speed = rates.nvlink if config.rollout.engine.colocate else rates.network
    element = ELEMENT_BYTES[config.rollout.engine.dtype or config.model.dtype]
    return element * count_parameters(network)[0] / (speed * rates.bandwidth_share)


def whole_steps(config: Config, network: Network, lengths: Lengths, *, train_s_per_token: float, engines: int,
                rates: Rates, engine_rates: EngineRates) -> list[dict[str, Any]]:
    """The mean of each collector's measured steps, what that makes of a day, and how much steps differ in tokens/s.

    As many steps as `lengths` has, at least STEPS. engines: how many stand apart, on rollout.engine.tp GPUs each; on
    the ranks' GPUs there are as many as fit.
    """
    decoder = engine_of(network, config, lengths, engine_rates)
    rows = []
    for variant in variants(config):
        colocated, tp = variant.rollout.engine.colocate, variant.rollout.engine.tp
        count = variant.parallel.world_size // tp if colocated else engines
        seen = simulate_steps(variant, decoder, count, lengths, train_s_per_token=train_s_per_token,
                              publish_s=publish_seconds(variant, network, rates),
                              steps=max(STEPS, len(lengths.steps)))[WARM_UP:]
        speeds = np.array([step.trained / step.seconds for step in seen])
        row = {field.name: float(np.mean([getattr(step, field.name) for step in seen]))
               for field in dataclasses.fields(Step)}
        gpus = variant.parallel.world_size + (0 if colocated else engines * tp)
        rows.append({"collector": variant.rollout.collector, "colocated": colocated, "gpus": gpus,
                     "engines": count, "slots": decoder.slots, **row, "oldest": max(step.oldest for step in seen),
                     "steps_per_day": 86400 / row["seconds"], "tokens_per_day": 86400 * row["trained"] / row["seconds"],
                     "tokens_per_s_per_gpu": row["trained"] / row["seconds"] / gpus,
                     "tokens_per_s_cv": float(speeds.std() / speeds.mean())})
    return rows
