"""The publisher's calls come in an order that NCCL can live with, whose collectives wait where gloo's do not.

NCCL makes a communicator in the group's first collective, which blocks the calling thread until every rank has entered
it; and one end of a group may wait for the others when it is destroyed. The engines are servers that answer as
SGLang's do; what stands for NCCL waits for them as it would.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
import pytest
import torch

from megatron_rl.rollout.client import EngineClient
from megatron_rl.sync import broadcast
from megatron_rl.sync.broadcast import BroadcastPublisher
from megatron_rl.sync.publish import PublishError

PATIENCE_S = 120.0
"""Stands for ever."""
WEIGHTS = [("a", torch.ones(40)), ("b", torch.ones(40)), ("c", torch.ones(40))]


class Nccl:
    """What both ends of the group do, and in which order they were seen."""

    def __init__(self):
        self.engine_enters, self.engine_leaves, self.we_leave = (threading.Event() for _ in range(3))
        self.refuses = False
        self.ended: list[str] = []

    def broadcast(self, tensor, src, group, async_op):
        if not self.engine_enters.wait(PATIENCE_S):
            raise AssertionError("the engine never entered the collective: its request waits behind ours")
        self.engine_enters.clear()
        return self

    def is_completed(self) -> bool:
        return True

    def wait(self) -> bool:
        return True

    def destroy(self, group) -> None:
        self.we_leave.set()
        if not self.engine_leaves.wait(PATIENCE_S):
            raise AssertionError("the engine never left the group while we waited for it")
        self.ended.append("destroyed")

    def abort(self, group) -> None:
        self.ended.append("aborted")

    def answer(self, path: str) -> tuple[int, dict]:
        """What an engine of one rank does for this request, and its answer."""
        if path == "/update_weights_from_distributed":
            if self.refuses:
                return 400, {"success": False, "message": "no room"}
            self.engine_enters.set()
        elif path == "/destroy_weights_update_group":
            self.engine_leaves.set()
            if not self.we_leave.wait(PATIENCE_S):
                return 500, {"success": False, "message": "we never left the group while the engine waited for us"}
        return 200, {"tp_size": 1, "success": True, "message": ""}


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Nccl:
    ours = Nccl()
    monkeypatch.setattr(broadcast, "_join_group", lambda *_: object())
    monkeypatch.setattr(broadcast, "_abort_process_group", ours.abort)
    for name, call in {"broadcast": ours.broadcast, "destroy_process_group": ours.destroy,
                       "set_timeout": lambda *_: None}.items():
        monkeypatch.setattr(broadcast.dist, name, call)
    return ours


@pytest.fixture
def publisher(nccl: Nccl) -> Iterator[BroadcastPublisher]:
    class Engine(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            status, said = nccl.answer(self.path)
            body = orjson.dumps(said)
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        client = EngineClient(f"http://127.0.0.1:{server.server_port}")
        yield BroadcastPublisher([client], bucket_bytes=200, backend="nccl", device="cpu")
        server.shutdown()
        thread.join()


def test_a_collective_that_waits_for_the_engines_does_not_hold_back_their_requests(publisher):
    assert publisher.publish(WEIGHTS, 1).buckets == 3
    assert publisher.publish(WEIGHTS, 2).buckets == 3, "in the same group"


def test_both_ends_leave_the_group_at_the_same_time(publisher, nccl):
    publisher.publish(WEIGHTS, 1)
    publisher.close()
    assert nccl.ended == ["destroyed"]


def test_a_publish_that_fails_ends_the_group_without_waiting_for_anyone(publisher, nccl):
    """The collective is still blocked in its thread: an engine that refuses never enters it."""
    nccl.refuses = True
    with pytest.raises(PublishError, match="HTTP 400.*no room"):
        publisher.publish(WEIGHTS, 1)
    assert nccl.ended == ["aborted"]
    nccl.engine_enters.set()  # lets the thread end
