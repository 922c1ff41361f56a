"""The client of a remote judge, against a real HTTP server that speaks SandboxFusion's protocol."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_rl.config.reward import CodeConfig, RemoteConfig
from megatron_rl.config.schema import RewardConfig
from megatron_rl.reward import Routes
from megatron_rl.types import Prompt

SUMS = {"language": "python", "mode": "stdin",
        "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6", "output": "11"}]}
CALLS = {"language": "python", "mode": "function", "entry_point": "f", "tests": [{"args": [2], "expected": 4}]}


class Judge(BaseHTTPRequestHandler):
    """Runs Python as it comes (the tests' own programs). server.faults: what goes wrong first, one per request."""

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(content)
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self._answer(401, {"detail": "no key"})
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "busy":
            return self._answer(503, {"detail": "busy"})
        if fault == "refused":
            return self._answer(422, {"detail": "no such language"})
        if fault == "nonsense":
            return self._answer(200, ["nonsense"])
        if fault == "its own":
            return self._answer(200, {"status": "SandboxError", "message": "no room"})
        if fault == "cut":
            return self.connection.close()
        if fault == "cut in two":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b'{"status": ')
            return self.connection.close()
        if fault == "slow":
            self.server.over.wait(120)
        if content["language"] != "python":
            failed = {"status": "Finished", "return_code": 1, "stdout": "", "stderr": "main.cpp:1: error: no"}
            return self._answer(200, {"status": "Failed", "compile_result": failed, "run_result": None})
        self._answer(200, {"status": "Success", "compile_result": None, "run_result": self._run(content)})

    def _run(self, content: dict) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in content["files"].items():
                Path(folder, name).write_bytes(base64.b64decode(data))
            Path(folder, "main.py").write_text(content["code"])
            try:
                done = subprocess.run([sys.executable, "main.py"], cwd=folder, input=content["stdin"], text=True,
                                      timeout=content["run_timeout"], capture_output=True)
            except subprocess.TimeoutExpired:
                return {"status": "TimeLimitExceeded", "execution_time": content["run_timeout"]}
        return {"status": "Finished", "return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}

    def _answer(self, code: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(BrokenPipeError):  # the client has left
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not into the tests' output."""


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.faults, server.requests, server.over, server.key = [], [], threading.Event(), ""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def scorer(judge, *, time_s=10, **remote):
    config = RewardConfig(sandbox="remote", code=CodeConfig(time_s=time_s, compile_s=1),
                          remote=RemoteConfig(url=f"http://127.0.0.1:{judge.server_port}/", **remote))
    return Routes({"code": "code"}, config).scorer("code")


def score(scorer, code, metadata):
    return scorer.score(Prompt("p", (1,), "q", "a", "code", metadata), f"```\n{code}\n```")


@pytest.mark.slow
@pytest.mark.parametrize(("status", "task", "code"), [
    ("correct", SUMS, "print(sum(map(int, input().split())))"), ("wrong", SUMS, "print(3)"),
    ("compile_error", SUMS, "print(3"), ("runtime_error", SUMS, "raise KeyError(3)"),
    ("timeout", SUMS | {"time_s": 0.1}, "import time; time.sleep(99)"), ("output_limit", SUMS, "print('x' * 99999)"),
    ("memory_limit", SUMS, "raise MemoryError"), ("correct", CALLS, "def f(x): return x * x"),
    ("wrong", CALLS, "def f(x): return x + 1"), ("wrong", CALLS, "import os\nos._exit(0)"),
    ("wrong", CALLS, "class Yes(int):\n    def __eq__(self, other): return True\ndef f(x): return Yes()"),
    ("runtime_error", CALLS, "class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()"),
    ("wrong", CALLS, "import os, sys\nif __debug__: os.execv(sys.executable, [sys.executable, '-O', *sys.argv])\n"
                     "def f(x): return 0"),
    ("correct", CALLS | {"context": "import math"}, "from __future__ import annotations\ndef f(x): return x * x"),
    ("correct", SUMS | {"context": "import math"},
     "from __future__ import annotations\nif __name__ == '__main__': print(sum(map(int, input().split())))"),
    ("compile_error", SUMS | {"language": "cpp"}, "int main() {")])
def test_statuses_are_those_of_the_local_sandbox(judge, status, task, code):
    assert score(scorer(judge), code, task).status == status


@pytest.mark.parametrize("fault", ["busy", *(pytest.param(fault, marks=pytest.mark.slow)
                                             for fault in ("nonsense", "its own", "cut", "cut in two"))])
def test_what_may_pass_is_tried_again(judge, fault):
    ours = scorer(judge, retries=2)
    judge.faults[:] = [fault, fault]
    before = len(judge.requests)
    assert score(ours, "def f(x): return x * x", CALLS).status == "correct"
    assert len(judge.requests) == before + 3


def test_a_judge_that_stays_away_is_an_error_that_names_the_key(judge):
    ours = scorer(judge, retries=1)
    judge.faults[:] = ["busy", "busy"]
    failed = score(ours, "def f(x): return x * x", CALLS)
    assert failed.status == "error" and "reward.remote.url" in failed.detail and "503" in failed.detail
    judge.faults[:] = ["refused"]
    before = len(judge.requests)
    assert "422" in score(ours, "def f(x): return x * x", CALLS).detail
    assert len(judge.requests) == before + 1  # what is refused for good is not sent again


def test_a_judge_that_asks_for_a_key_gets_it_from_the_environment(judge, monkeypatch):
    judge.key = "secret"
    with pytest.raises(ValueError, match=r"reward.remote.url=.*401"):
        scorer(judge)
    with pytest.raises(ValueError, match="reward.remote.key_env=JUDGE_KEY.*not set"):
        scorer(judge, key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    ours = scorer(judge, key_env="JUDGE_KEY")
    assert score(ours, "def f(x): return x * x", CALLS).status == "correct"
    assert "secret" not in repr(ours._box)


@pytest.mark.slow
def test_a_judge_that_is_slow_is_left_after_the_limit(judge):
    ours = scorer(judge, retries=0, timeout_s=0.2, time_s=1)
    judge.faults[:] = ["slow"]
    failed = score(ours, "print(3)", SUMS)
    assert failed.status == "error" and "imed out" in failed.detail and not judge.over.is_set()


def test_a_judge_that_is_not_there_is_refused_at_once_with_its_key():
    remote = RemoteConfig(url="http://127.0.0.1:9", retries=0, timeout_s=1.0)
    with pytest.raises(ValueError, match="reward.routes.code=code: reward.remote.url=http://127.0.0.1:9"):
        Routes({"code": "code"}, RewardConfig(sandbox="remote", remote=remote))


@pytest.mark.parametrize(("settings", "message"), [
    ({"sandbox": "remote"}, "needs reward.remote.url"),
    ({"remote": {"url": "judge:80"}}, "reward.remote.url=judge:80")])
def test_settings_of_the_remote_judge_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**{name: RemoteConfig(**value) if name == "remote" else value
                        for name, value in settings.items()})
