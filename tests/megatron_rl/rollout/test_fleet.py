"""Which engine a request goes to, and which answers are let through; over HTTP, with servers that answer as told."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from megatron_rl.config.rollout import EngineConfig, RolloutConfig
from megatron_rl.config.schema import Config
from megatron_rl.orchestrator.serving import Serving
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.fleet import Fleet, FleetError, Tally
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.sampling import SamplingParams

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=4)
CONFIG = RolloutConfig(concurrency=8, retries=3, request_timeout_s=60.0, engine=EngineConfig(
    health_interval_s=0.05, hang_timeout_s=20.0, wait_timeout_s=60.0))


class Engine:
    """A server that labels itself `label` and answers with weights `version`; behave replaces its answers."""

    def __init__(self, version: int = 0, behave: Callable[[], Awaitable[web.Response | None]] | None = None):
        self.label, self.version, self._behave = version, version, behave
        self.waiting = 0
        self.seen: list[str] = []
        self.aborted: list[str] = []
        self.url = f"http://127.0.0.1:{choose_port(None)}"

    @asynccontextmanager
    async def serving(self):
        app = web.Application()
        self.add_routes(app)
        runner = self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(self.url.rsplit(":", 1)[1])).start()
        try:
            yield self
        finally:
            await runner.cleanup()

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/model_info", self._info)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)

    async def die(self) -> None:
        """Every open connection breaks, and nobody listens any more."""
        for site in list(self._runner.sites):
            await site.stop()
        for connection in list(self._runner.server.connections):
            connection.transport.abort()

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(self.label)})

    async def _loads(self, request: web.Request) -> web.Response:
        return web.json_response({"loads": [{"num_waiting_reqs": self.waiting}]})

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen.append(body["rid"])
        if self._behave is not None and (answer := await self._behave()) is not None:
            return answer
        return web.json_response({"output_ids": [1, 2], "meta_info": {
            "id": body["rid"], "output_token_logprobs": [[-1.0, 1, None], [-1.0, 2, None]], "cached_tokens": 0,
            "weight_versions": [{"version": str(self.version), "start": 0, "end": 2}], "num_retractions": 0,
            "finish_reason": {"type": "stop"}}})


def with_fleet(engines: list[Engine], use, config: RolloutConfig = CONFIG):
    async def run():
        async with AsyncExitStack() as stack:
            for engine in engines:
                await stack.enter_async_context(engine.serving())
            fleet = Fleet([EngineClient(engine.url) for engine in engines], config)
            await fleet.start()
            try:
                return await use(fleet)
            finally:
                await fleet.close()

    return asyncio.run(run())


async def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.02)


async def ask(fleet: Fleet, rid: str, tally: Tally | None = None):
    return await fleet.generate([5], rid=rid, sampling=SAMPLING, tally=tally or Tally())


def publish(fleet: Fleet, version: int, *engines: Engine, failed: tuple[Engine, ...] = ()) -> None:
    fleet.updating(version, [engine.url for engine in (*engines, *failed)])
    fleet.published(version, [engine.url for engine in engines], {engine.url: "refused" for engine in failed})


def test_requests_go_to_the_engine_with_the_fewest():
    async def slow() -> None:
        await asyncio.sleep(0.1)

    first, second = Engine(behave=slow), Engine(behave=slow)

    async def use(fleet: Fleet) -> None:
        await asyncio.gather(*(ask(fleet, f"r{i}") for i in range(8)))

    with_fleet([first, second], use)
    assert len(first.seen) == len(second.seen) == 4


def test_the_queue_is_the_mean_over_engines_and_looks_since_it_was_asked_for():
    short, long = Engine(7), Engine(7)
    short.waiting, long.waiting = 2, 6

    async def use(fleet: Fleet) -> None:
        await until(lambda: {2, 6} <= set(fleet._queues))
        looks = list(fleet._queues)
        assert fleet.take_queue_mean() == sum(looks) / len(looks)
        assert fleet.take_queue_mean() is None

    with_fleet([short, long], use)


def test_an_engine_that_missed_a_publish_serves_nothing_until_it_has_caught_up():
    current, stale = Engine(7), Engine(7)

    async def use(fleet: Fleet) -> None:
        publish(fleet, 7, current, failed=(stale,))
        await asyncio.gather(*(ask(fleet, f"r{i}") for i in range(4)))
        assert stale.seen == [] and fleet.serving == 1
        await until(lambda: fleet.behind() == [stale.url])  # it rests after its failure
        publish(fleet, 7, stale)
        assert fleet.behind() == [] and fleet.serving == 2
        await asyncio.gather(*(ask(fleet, f"s{i}") for i in range(4)))
        assert stale.seen

    with_fleet([current, stale], use)


def test_an_engine_that_was_restarted_is_noticed_by_its_label_and_its_answers_are_thrown_away():
    steady, restarted = Engine(3), Engine(3)

    async def use(fleet: Fleet) -> None:
        publish(fleet, 3, steady, restarted)
        restarted.version = -1  # before the watch has seen its label
        tally = Tally()
        results = await asyncio.gather(*(ask(fleet, f"r{i}", tally) for i in range(4)))
        assert {span.version for result in results for span in result.weight_versions} == {3}
        assert tally.retries >= 1 and tally.delivered_tokens == 2 * (4 + tally.retries)
        restarted.label = -1
        await until(lambda: fleet.behind() == [restarted.url])

    with_fleet([steady, restarted], use)


def test_a_request_may_see_the_publish_that_happens_meanwhile():
    published = asyncio.Event()

    async def wait() -> None:
        await published.wait()

    engine = Engine(1, behave=wait)

    async def use(fleet: Fleet) -> None:
        publish(fleet, 1, engine)
        request = asyncio.create_task(ask(fleet, "r"))
        await until(lambda: engine.seen == ["r-0."])
        engine.version = engine.label = 2
        publish(fleet, 2, engine)
        published.set()
        assert (await request).weight_versions[0].version == 2

    with_fleet([engine], use)


def test_an_engine_that_keeps_failing_gets_one_request_at_a_time_until_it_succeeds():
    good, busy, most = Engine(), [0], [0]

    async def fail() -> web.Response:
        busy[0] += 1
        most.append(busy[0])
        await asyncio.sleep(0.02)
        busy[0] -= 1
        return web.json_response({"error": "broken"}, status=500)

    bad = Engine(behave=fail)

    async def use(fleet: Fleet) -> None:
        async def ask_until(holds: Callable[[], bool]) -> None:
            async with asyncio.timeout(60.0):
                for round_ in itertools.takewhile(lambda _: not holds(), itertools.count()):
                    await asyncio.gather(*(ask(fleet, f"r{round_}-{i}") for i in range(6)))
                    await asyncio.sleep(0.02)

        await ask_until(lambda: fleet.serving == 1)
        most.clear()
        await ask_until(lambda: most)
        assert max(most) == 1

    with_fleet([good, bad], use)


def test_no_answer_after_all_attempts_says_what_each_engine_did():
    async def fail() -> web.Response:
        return web.Response(text="{", content_type="application/json")

    with pytest.raises(FleetError, match=r"request r: no response after 2 attempts \(rollout.retries=1\).*it answered"):
        with_fleet([Engine(behave=fail)], lambda fleet: ask(fleet, "r"),
                   RolloutConfig(retries=1, engine=CONFIG.engine))


def test_a_refused_request_is_asked_once_and_is_not_the_engines_fault():
    async def refuse() -> web.Response | None:
        return web.json_response({"error": {"message": "too long"}}, status=400) if refusing else None

    engines, refusing = [Engine(behave=refuse), Engine(behave=refuse)], True

    async def use(fleet: Fleet) -> None:
        nonlocal refusing
        tally = Tally()
        with pytest.raises(FleetError, match=r"request r-0\. can never succeed: .*HTTP 400: .*too long"):
            await ask(fleet, "r", tally)
        assert [rid for engine in engines for rid in engine.seen] == ["r-0."]
        assert (tally.retries, fleet.serving) == (0, 2)
        assert "failed" not in fleet.describe()
        refusing = False
        await asyncio.gather(*(ask(fleet, f"s{number}") for number in range(4)))  # neither is in quarantine
        assert sum(len(engine.seen) for engine in engines) == 5

    with_fleet(engines, use, RolloutConfig(retries=3, engine=CONFIG.engine))


def test_an_id_is_no_prefix_of_another():
    """SGLang aborts every request whose id starts with the one given."""
    engine = Engine()

    async def use(fleet: Fleet) -> None:
        await asyncio.gather(ask(fleet, "train-1-1"), ask(fleet, "train-1-11"), ask(fleet, "train-1-1-0"))

    with_fleet([engine], use)
    assert not any(a != b and b.startswith(a) for a in engine.seen for b in engine.seen)


def test_what_an_engine_that_fails_a_publish_was_working_on_goes_elsewhere():
    """Also what it had answered before it was found out: the probe comes after the engine has resumed."""
    held, late = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        await (held if len(failing.seen) == 1 else late).wait()

    failing, other = Engine(behave=hold), Engine()

    async def use(fleet: Fleet) -> None:
        publish(fleet, 0, failing)
        requests = [asyncio.create_task(ask(fleet, f"r{i}")) for i in range(2)]
        await until(lambda: len(failing.seen) == 2)
        fleet.updating(1, [failing.url, other.url])
        failing.version = failing.label = other.version = other.label = 1
        held.set()
        await asyncio.sleep(0.3)
        assert not any(request.done() for request in requests)  # it may yet fail its probe
        fleet.published(1, [other.url], {failing.url: "probe"})
        await asyncio.wait_for(asyncio.gather(*requests), 60.0)
        assert len(failing.seen) == len(other.seen) == 2
        late.set()

    with_fleet([failing, other], use)


def one_attempt_is_lost(meanwhile: Callable[[Fleet], Awaitable[None]]) -> None:
    """The one engine dies of a request and comes back. The request has one second attempt, and takes it then.

    meanwhile: awaited before the request.
    """
    engine = Engine()

    async def die() -> None:
        engine._behave = None
        await engine.die()

    engine._behave = die

    async def use(fleet: Fleet) -> None:
        await meanwhile(fleet)
        request = asyncio.create_task(ask(fleet, "r"))
        await until(lambda: fleet.answering() == [])
        assert not request.done(), "it has no second attempt to spare"
        await web.TCPSite(engine._runner, "127.0.0.1", int(engine.url.rsplit(":", 1)[1])).start()
        await asyncio.wait_for(request, 60.0)
        assert engine.seen == ["r-0.", "r-1."]

    slow_watch = replace(CONFIG.engine, health_interval_s=0.6)  # slower than the engine's rest after its failure
    with_fleet([engine], use, replace(CONFIG, retries=1, engine=slow_watch))


def test_a_request_loses_one_attempt_to_an_engine_that_dies():
    """It has no other engine to go to, so it waits until the watch has found the engine gone."""
    async def nothing(fleet: Fleet) -> None:
        pass

    one_attempt_is_lost(nothing)


def test_what_an_engine_said_before_its_connection_broke_says_nothing_of_it_afterwards():
    """The watch reads an answer of the engine only after a request has found it dead."""
    async def the_watch_reads_late(fleet: Fleet) -> None:
        (member,) = fleet._members
        look, answered = member.client.weight_version, asyncio.Event()

        async def read_late(**options) -> int:
            label = await look(**options)
            answered.set()
            await until(lambda: member.unanswered_since is not None)
            return label

        member.client.weight_version = read_late
        await answered.wait()

    one_attempt_is_lost(the_watch_reads_late)


def test_at_the_end_requests_are_aborted_before_connections_are_closed():
    engine = Engine(behave=asyncio.Event().wait)

    async def end_with_a_request() -> None:
        config = Config(rollout=replace(CONFIG, engine=replace(CONFIG.engine, urls=(engine.url,))))
        async with Serving(config) as serving:
            request = asyncio.create_task(ask(serving.fleet, "r"))
            await until(lambda: engine.seen == ["r-0."])
            (member,) = serving.fleet._members
        assert request.cancelled() and engine.aborted == ["r-0."]
        assert member.client._connection._session is None

    async def serve() -> None:
        async with engine.serving():  # in a loop of its own: at its end the program cancels all that runs in its loop
            await asyncio.to_thread(lambda: asyncio.run(end_with_a_request()))

    asyncio.run(serve())
