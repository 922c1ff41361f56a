"""Another user of the machine gets nothing from an engine, changes nothing in it, and finds no key."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_rl.compat.sglang_key import HIDDEN
from megatron_rl.config.load import to_dict
from megatron_rl.config.rollout import ENGINE_KEY, EngineConfig
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.launch.keys import check_keys
from megatron_rl.launch.local import engines_for
from megatron_rl.rollout.client import engine_clients
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.sampling import SamplingParams
from tests.engine.conftest import ROLLOUT
from tests.tiny_models import write_tiny_bailing

NOBODY = 65534
# What any local user can try, with the standard library alone. Standard input: JSON of url, routes, folders, pids, and
# the key to look for (a user who finds it has it).
STRANGER = r"""
import encodings.idna, http.client, json, os, socket, sys, urllib.parse
os.setgroups([]); os.setresgid(NOBODY, NOBODY, NOBODY); os.setresuid(NOBODY, NOBODY, NOBODY)  # now another user
given = json.load(sys.stdin)
place = urllib.parse.urlsplit(given["url"])

def status(method, path, headers):
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    connection.request(method, path, body=json.dumps(given["body"]),
                       headers={"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    answer.read()
    return answer.status

wrong = ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}, {"Authorization": given["key"][:-1]},
         {"Authorization": "Bearer " + given["key"][:-1]}, {"X-Api-Key": given["key"]})
upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
           "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
found = {"uid": os.getuid(), "status": {}, "sockets": {}, "leaks": []}
for method, path in given["routes"]:
    for number, headers in enumerate(wrong):
        found["status"][f"{method} {path} {number}"] = status(method, path, headers)
for path in ("/", "/v1/realtime", "/generate"):
    found["status"][f"upgrade {path}"] = status("GET", path, upgrade)

def leaks(path):
    try:
        with open(path, "rb") as file:
            return given["key"].encode() in file.read()
    except OSError:
        return False

for pid in given["pids"]:
    found["leaks"] += [path for name in ("cmdline", "environ", "status") if leaks(path := f"/proc/{pid}/{name}")]
for folder in given["folders"]:
    for at, _, names in os.walk(folder):
        found["leaks"] += [os.path.join(at, name) for name in names if leaks(os.path.join(at, name))]
for path in given["sockets"]:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        try:
            with socket.socket(socket.AF_UNIX, kind) as one:
                one.connect(chr(0) + path[1:] if path.startswith("@") else path)
            found["sockets"][path] = "open"
        except PermissionError:
            found["sockets"].setdefault(path, "refused")
        except ConnectionRefusedError if path.startswith("@") else ():  # an abstract one, on which nobody listens
            found["sockets"].setdefault(path, "refused")
        except OSError as error:
            found["sockets"].setdefault(path, str(error))
json.dump(found, sys.stdout)
"""


def whole_family() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def connections(pid: int, kind: str) -> list:
    """None of a process that has ended meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).net_connections(kind)
    return []


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def unix_sockets(pids: set[int]) -> list[str]:
    """Paths on which these processes listen or are bound."""
    return sorted({connection.laddr for pid in pids for connection in connections(pid, "unix") if connection.laddr})


def listening(pids: set[int]) -> dict[str, set[int]]:
    """Address -> ports on which these processes wait for connections over TCP."""
    found: dict[str, set[int]] = {}
    for pid in pids:
        for connection in connections(pid, "tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found.setdefault(connection.laddr.ip, set()).add(connection.laddr.port)
    return found


def weights(served: Config) -> tuple:
    async def ask():
        async with engine_clients(served)[0] as client:
            return await client.checksums(), await client.weight_version(), (await client.generate(
                (5, 6, 7), rid="r", sampling=SamplingParams(temperature=0.0, max_new_tokens=8))).output_ids.tolist()

    return asyncio.run(ask())


def with_key(url: str, path: str) -> dict:
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {os.environ[ENGINE_KEY]}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def served(model_folder: Path, tmp_path_factory) -> Iterator[tuple[Config, Path]]:
    """An engine as every command starts it: on loopback, with a key of its own."""
    folder = tmp_path_factory.mktemp("keys")
    shown, os.environ["TMPDIR"] = os.environ.get("TMPDIR"), str(folder)
    kept = os.environ.pop(ENGINE_KEY)
    config = Config(model=ModelConfig(path=str(model_folder)), rollout=ROLLOUT)
    try:
        with engines_for(config, str(model_folder), folder / "engine.log") as running:
            (folder / "config.json").write_text(json.dumps(to_dict(running)))
            yield running, folder
    finally:
        os.environ[ENGINE_KEY] = kept
        if shown is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = shown


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_gets_401_everywhere_and_changes_nothing(served, tmp_path_factory):
    config, folder = served
    (url,) = config.rollout.engine.urls
    other = write_tiny_bailing(tmp_path_factory.mktemp("other") / "model", seed=9, norm_head=True)
    published = [[method.upper(), path.replace("{", "").replace("}", "")]
                 for path, methods in with_key(url, "/openapi.json")["paths"].items() for method in methods]
    assert len(published) > 60 and ["POST", "/update_weights_from_disk"] in published
    hidden = [[method, path] for path in ("/", "/health", "/health_generate", "/ready", "/readyz", "/metrics", "/docs",
                                          "/openapi.json", "/redoc", "/no/such/path")
              for method in ("GET", "POST", "OPTIONS", "HEAD")]
    options = [["OPTIONS", path] for _, path in published]
    pids = {process.pid for process in whole_family()}
    body = {"model_path": str(other), "flush_cache": True, "weight_version": "99", "input_ids": [5], "mode": "abort",
            "sampling_params": {"max_new_tokens": 1}, "tags": ["weights"], "serialized_named_tensors": []}
    before = weights(config)
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER.replace("NOBODY", str(NOBODY))], cwd="/", capture_output=True, text=True,
        timeout=300,
        input=json.dumps({"url": url, "routes": [*published, *hidden, *options], "key": os.environ[ENGINE_KEY],
                          "pids": sorted(pids), "folders": [str(folder), "/dev/shm"], "body": body,
                          "sockets": unix_sockets(pids)}))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["uid"] == NOBODY
    let_in = {what: status for what, status in found["status"].items()
              if status != 401 and not (what.startswith("upgrade") and status == 403)}
    assert let_in == {} and len(found["status"]) > 6 * 60
    assert found["leaks"] == []
    assert set(found["sockets"].values()) <= {"refused"} and len(found["sockets"]) >= 3, found["sockets"]
    assert weights(config) == before


def test_nothing_of_an_engine_listens_to_other_machines(served):
    pids = {process.pid for process in whole_family()}
    found = listening(pids)
    assert len(found.get("127.0.0.1", ())) >= 2, found  # the server and its torch.distributed store
    assert set(found) <= {"127.0.0.1", "::1"}, found


def test_the_key_is_in_no_log_no_list_of_processes_and_no_written_configuration(served):
    config, folder = served
    key, (url,) = os.environ[ENGINE_KEY], config.rollout.engine.urls
    shown = "".join(map(command_of, psutil.Process().children(recursive=True)))
    assert url.rsplit(":", 1)[1] in shown and key not in shown
    log = (folder / "engine.log").read_text()
    assert HIDDEN in log and key not in log
    assert key not in (folder / "config.json").read_text()


def test_a_server_without_a_key_or_with_another_is_refused_by_its_url(served, tmp_path, monkeypatch):
    config, _ = served
    check_keys(config.rollout.engine)
    monkeypatch.setenv("MINE", "another key")
    theirs = EngineConfig(urls=config.rollout.engine.urls, api_key_env="MINE")
    with pytest.raises(ValueError, match=r"urls: http://127.0.0.1:\d+ refuses the key in .* MINE \(HTTP 401\)"):
        check_keys(theirs)
    check_keys(EngineConfig(urls=("http://127.0.0.1:9",), api_key_env="MINE"))  # down: the fleet waits for it
    with open_server(tmp_path) as process:
        with pytest.raises(ValueError, match=r"answers without a key \(HTTP 200\), so any user"):
            check_keys(EngineConfig(urls=(process.base_url,), api_key_env="MINE"))


def open_server(folder: Path) -> EngineProcess:
    from tests.megatron_rl.rollout.test_supervisor import server

    return server(folder)
