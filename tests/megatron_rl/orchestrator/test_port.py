"""The wire between the two programs: who may ask, what asking again gives, what a new orchestrator takes over."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rl.config.orchestrator import RUN_KEY, OrchestratorConfig
from megatron_rl.orchestrator import port as port_module
from megatron_rl.orchestrator.port import Heard, RankHangs, TrainerPort
from megatron_rl.rollout.ports import choose_port
from megatron_rl.trainer.client import CUT_OFF, Heartbeat, Link, OrchestratorClient, OrchestratorLost

ROOT = Path(__file__).resolve().parents[3]
ALONE = SimpleNamespace(is_main=True, rank=0, dp_rank=0, replica_firsts=(0,), broadcast_object=lambda value: value,
                        share_with_replica=lambda body: body)


@pytest.fixture
def options(monkeypatch) -> OrchestratorConfig:
    monkeypatch.setenv(RUN_KEY, "the key")
    monkeypatch.setattr(port_module, "POLL_S", 0.2)
    return OrchestratorConfig(port=choose_port(None), wait_timeout_s=60.0)


def with_port(options, use, world_size: int = 1):
    """The result of use(port), in the port's loop."""

    async def run():
        async with TrainerPort(options, world_size) as port:
            return await use(port)

    return asyncio.run(run())


def test_without_the_key_nothing_is_told(options):
    async def use(port):
        client = OrchestratorClient(options)
        told = [await asyncio.to_thread(client.try_once, "GET", "/health", timeout_s=60.0)]
        for wrong in ("", "Bearer", "Bearer the keys", "the key"):
            client._headers["Authorization"] = wrong
            for path in ("/health", "/command/0", "/step/0/shard/0", "/state/0"):
                told.append(await asyncio.to_thread(client.try_once, "GET", path, timeout_s=60.0))
        return [status for status, _ in told]

    assert with_port(options, use) == [200] + [401] * 16


def test_asking_again_gives_the_same_and_an_outcome_that_is_told_twice_counts_once(options):
    async def use(port):
        client = OrchestratorClient(options)

        async def ask(method, path, value=None):
            return await asyncio.to_thread(client.try_once, method, path, value, timeout_s=60.0)

        assert (await ask("GET", "/command/0"))[0] == 204  # there is none yet
        first = asyncio.create_task(port.execute("train", step=3))
        answers = [await ask("GET", "/command/0") for _ in range(2)]
        assert answers == [(200, b'{"kind": "train", "step": 3}')] * 2
        assert [(await ask("POST", "/done/0", {"seconds": 1}))[0] for _ in range(2)] == [200, 200]
        assert await first == {"seconds": 1}
        second = asyncio.create_task(port.execute("publish", version=4))
        assert (await ask("GET", "/command/0"))[1] == answers[0][1]  # its answer had been lost
        assert (await ask("POST", "/done/0", {"seconds": 9}))[0] == 200 and not second.done()
        assert (await ask("GET", "/command/2"))[0] == 409
        assert b'"version": 4' in (await ask("GET", "/command/1"))[1]
        await ask("POST", "/done/1", {"bytes": 5})
        assert await second == {"bytes": 5}

    with_port(options, use)


def test_the_trainer_waits_for_an_orchestrator_that_is_started_again_and_goes_on_counting(options):
    """The first dies while the trainer is busy: it hears nothing of the outcome, and gives its own commands."""
    link, obeyed = Link(options, ALONE), []
    busy, dead = threading.Event(), threading.Event()

    def trainer() -> None:
        while not obeyed or obeyed[-1]["kind"] != "finish":
            command = link.next()
            if "until_death" in command:
                busy.set()
                assert dead.wait(60)
            obeyed.append(command)
            link.done({"of": command["kind"]})

    async def run():
        working = asyncio.create_task(asyncio.to_thread(trainer))
        async with TrainerPort(options, 1) as first:
            await first.execute("start")
            outcome = asyncio.create_task(first.execute("train", step=0, until_death=True))
            assert await asyncio.to_thread(busy.wait, 60)
            outcome.cancel()
        dead.set()
        await asyncio.sleep(0.5)  # nobody answers
        async with TrainerPort(options, 1) as again:
            said = await again.execute("train", step=0), await again.execute("finish")
            await working
        return said

    assert asyncio.run(run()) == ({"of": "train"}, {"of": "finish"})
    assert [command["kind"] for command in obeyed] == ["start", "train", "train", "finish"]


def test_a_shard_is_waited_for_until_it_is_offered_and_old_ones_are_forgotten(options):
    async def use(port):
        client = OrchestratorClient(options)
        body = asyncio.create_task(asyncio.to_thread(client.request, "GET", "/step/3/shard/1"))
        state = asyncio.create_task(asyncio.to_thread(client.request, "GET", "/state/4"))
        await asyncio.sleep(0.5)
        assert not body.done() and not state.done()
        port.offer(3, [b"zero", b"one"])
        port.keep_state(4, b"state")
        assert (await body, await state) == (b"one", b"state")
        with pytest.raises(RuntimeError, match="404"):
            await asyncio.to_thread(client.request, "GET", "/step/3/shard/2")
        for step in (4, 5):
            port.offer(step, [b"later"])
        assert list(port._shards) == [4, 5]

    with_port(options, use)


def test_an_orchestrator_that_never_comes_is_named(options):
    link = Link(dataclasses.replace(options, wait_timeout_s=0.5), ALONE)
    with pytest.raises(OrchestratorLost, match=rf"at 127.0.0.1:{options.port} has not answered for "
                                               r"orchestrator.wait_timeout_s=0.5"):
        link.next()


CUT = """
import time
from megatron_rl.config.orchestrator import OrchestratorConfig
from megatron_rl.trainer import client
client.Heartbeat(OrchestratorConfig("nowhere.invalid", 9, wait_timeout_s=0.1, hang_timeout_s=1.0), 1).start()
time.sleep(600)
"""


def test_a_rank_that_is_cut_off_ends_however_short_the_wait_for_the_orchestrator(options):
    done = subprocess.run([sys.executable, "-c", CUT], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"})
    assert done.returncode == CUT_OFF and "has had no way to nowhere.invalid" in done.stderr, done.stderr


def test_an_orchestrator_that_hangs_is_not_out_of_reach_for_hundreds_of_ranks(options):
    """Connections that it does not take yet queue in its kernel; with a full queue its machine would seem cut off."""
    async def use(port):
        def connect() -> list[socket.socket]:
            return [socket.create_connection(("127.0.0.1", options.port), timeout=1.0) for _ in range(300)]

        with ThreadPoolExecutor(1) as thread:
            connected = thread.submit(connect)
            connected.exception(60.0)  # the event loop stands still
        for each in connected.result():
            each.close()

    with_port(options, use)


@pytest.mark.parametrize("spoke_once", [True, False])
def test_a_silent_rank_is_named_with_what_it_did_last(spoke_once, options, monkeypatch):
    """Rank 0 goes on speaking. Before the trainer has asked for anything, nobody is expected to."""
    options = dataclasses.replace(options, hang_timeout_s=1.5)
    monkeypatch.setattr(port_module, "LOOK_S", 0.1)

    async def speak(port):
        """As rank 0, in the loop of the watch: held up for no longer than that is."""
        while True:
            port._ranks[0] = Heard(time.monotonic(), {"pid": 1, "host": "n1", "doing": "train 7"})
            await asyncio.sleep(0.05)

    async def use(port):
        watch = asyncio.create_task(port.watch())
        await asyncio.sleep(2.0)
        assert not watch.done()
        speaking = asyncio.create_task(speak(port))
        if spoke_once:
            beat = Heartbeat(options, 1)
            beat.doing = "train 7"
            beat.start()
            while not (1 in port._ranks and port._ranks[1].about):
                await asyncio.sleep(0.01)
            beat.stop()
        await asyncio.to_thread(OrchestratorClient(options).try_once, "GET", "/command/0", timeout_s=60.0)
        try:
            await asyncio.wait_for(watch, 60.0)
        finally:
            speaking.cancel()

    said = r"rank 1 \(pid \d+ on \S+\) of the trainer hangs.*hang_timeout_s=1.5; the last it said: train 7"
    with pytest.raises(RankHangs, match=said if spoke_once else "rank 1 of the trainer hangs"):
        with_port(options, use, world_size=2)
