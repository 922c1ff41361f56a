"""The sandbox holds: no hostile program gets out, and none disturbs a neighbour that runs at the same time."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_rl.reward.languages import build
from megatron_rl.reward.sandbox import Bubblewrap, Limits, Outcome, box, watch
from megatron_rl.reward.sandbox.slots import leased_uid
from tests.megatron_rl.reward.attacks import ATTACKS, Attack
from tests.sandboxes import needs_language, needs_sandbox

SECRET = "a-value-of-the-host"
TIGHT = Limits(cpu_s=1, wall_s=1.0, memory_mb=256)  # for what goes on until it is stopped by the clock
ROOMY = Limits(cpu_s=8, wall_s=25.0, memory_mb=256)
NEIGHBOUR = """
import os, subprocess
numbers = list(range(300_000))
with open("/tmp/mine", "w") as file: file.write(str(sum(numbers)))
children = [os.fork() for _ in range(1)]
if 0 in children: os._exit(0)
os.wait()
assert os.listdir("/tmp") == ["mine"]
print(open("/tmp/mine").read())
"""


class Host:
    """What the attacks are after, and whether it is untouched."""

    def __init__(self, folder: Path):
        self.file = folder / "canary"
        self.file.write_text(SECRET)
        self.file.chmod(0o666)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.process = subprocess.Popen(["sleep", "600"])

    def fill_in(self, source: str) -> str:
        for name, value in (("FILE", self.file), ("PORT", self.listener.getsockname()[1]), ("PID", self.process.pid),
                            ("SECRET", SECRET)):
            source = source.replace(f"@{name}@", str(value))
        return source

    def check(self) -> None:
        assert self.file.read_text() == SECRET
        assert self.process.poll() is None
        with pytest.raises(BlockingIOError):
            self.listener.accept()
        gone_by = time.monotonic() + 60  # the kernel kills them with the sandbox's first process
        while [each for each in psutil.process_iter(["cmdline"]) if "98765" in (each.info["cmdline"] or [])]:
            assert time.monotonic() < gone_by

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.listener.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    os.environ["CANARY"] = SECRET
    folder = tmp_path_factory.mktemp("host")
    for each in (folder, *folder.parents):
        if each.owner() != "root" or each.stat().st_mode & 0o5 != 0o5:
            each.chmod(each.stat().st_mode | 0o5)
    host = Host(folder)
    yield host
    host.close()
    del os.environ["CANARY"]


@pytest.fixture
def neighbour():
    """Honest programs, one after another in sandboxes of their own, all the while; each must come out right."""
    over, outcomes = threading.Event(), []

    def run() -> None:
        while not (over.is_set() and outcomes):
            outcomes.append(Bubblewrap().run(["/usr/bin/python3", "-I", "/box/main.py"],
                                             {"main.py": NEIGHBOUR.encode()}, limits=ROOMY))

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        yield
        over.set()
        running.result()
    assert not [each for each in outcomes if (each.status, each.stdout) != ("ok", b"44999850000\n")]


def run_program(language: str, source: str, limits: Limits) -> Outcome:
    name = {"python": "main.py", "cpp": "main.cpp", "java": "Main.java"}[language]
    program = build(Bubblewrap(), language, {name: source}, limits, main_class="Main",
                    compile_s=2 if limits is TIGHT and language == "cpp" else 8)
    return program if isinstance(program, Outcome) else program(b"some input\n", 1 << 16)


@pytest.mark.slow
@needs_sandbox
@pytest.mark.parametrize("attack", [pytest.param(attack, id=attack.name, marks=needs_language(attack.language))
                                    for attack in ATTACKS])
def test_no_attack_succeeds_or_disturbs_a_neighbour(attack, host, neighbour):
    limits = TIGHT if "timeout" in attack.status else ROOMY
    outcome = run_program(attack.language, host.fill_in(attack.source), limits)
    assert _held(attack, outcome), outcome
    host.check()


def test_there_are_enough_attacks():
    assert len(ATTACKS) >= 40 and len({attack.name for attack in ATTACKS}) == len(ATTACKS)


HONEST = {
    "python": "import sys\nprint(sys.stdin.readline().upper().strip())",
    "cpp": "#include <iostream>\n#include <string>\nint main() { std::string s; std::getline(std::cin, s); "
           "for (auto& c : s) c = toupper(c); std::cout << s << std::endl; }",
    "java": "import java.io.*; class Main { public static void main(String[] a) throws Exception { System.out.println("
            "new BufferedReader(new InputStreamReader(System.in)).readLine().toUpperCase()); } }",
}


@pytest.mark.slow
@needs_sandbox
@pytest.mark.parametrize("language", [pytest.param(name, marks=needs_language(name)) for name in HONEST])
def test_honest_programs_pass_beside_a_fork_bomb(language):
    bomb = next(attack for attack in ATTACKS if attack.name == "fork bomb that waits for room")
    with ThreadPoolExecutor(1) as pool:
        bombing = pool.submit(run_program, "python", bomb.source, TIGHT)
        outcome = run_program(language, HONEST[language], ROOMY)
        bombing.result()
    assert (outcome.status, outcome.stdout) == ("ok", b"SOME INPUT\n"), outcome


@needs_sandbox
def test_two_runs_at_a_time_have_two_user_ids():
    if os.geteuid() != 0:
        pytest.skip("only root can give each run a user id of its own")
    with leased_uid() as first, leased_uid() as second:
        assert first != second and min(first, second) >= 60000


@pytest.mark.slow
@needs_sandbox
def test_nothing_is_left_when_the_parent_is_killed():
    source = ("from megatron_rl.reward.sandbox import *\nBubblewrap().run(['/usr/bin/sleep', '87654'], {}, "
              "limits=Limits(wall_s=60.0))")
    parent = subprocess.Popen([sys.executable, "-c", source])

    def sleepers() -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["cmdline", "name"])
                if each.info["name"] == "sleep" and "87654" in (each.info["cmdline"] or [])]

    deadline = time.monotonic() + 60
    while not sleepers():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while sleepers():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_sandbox
@pytest.mark.parametrize("walls_up", [False, True])
def test_an_exception_while_a_program_runs_leaves_nothing(walls_up):
    for wait_s in [0.2] if walls_up else [step / 1000 for step in range(0, 20, 2)]:
        with pytest.raises(KeyError), Bubblewrap().start(["/usr/bin/sleep", "76543"], {}, stdin=b"", limits=TIGHT):
            time.sleep(wait_s)
            raise KeyError
        deadline = time.monotonic() + 60
        while any("76543" in (each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@needs_sandbox
def test_a_program_that_gets_no_processor_is_not_charged_for_it():
    cpu = min(os.sched_getaffinity(0))
    # 20 sessions: a kernel may share a processor out by session (autogroup), and the program has one of its own
    hog = subprocess.Popen([sys.executable, "-c", f"import os, time\nos.sched_setaffinity(0, {{{cpu}}})\n"
                            "for _ in range(20):\n    if os.fork() == 0:\n        os.setsid()\n        break\n"
                            "print('works', flush=True)\nend = time.monotonic() + 6\n"
                            "while time.monotonic() < end: pass"], stdout=subprocess.PIPE)
    for _ in range(21):
        assert hog.stdout.readline() == b"works\n"
    # it ends by the clock: once the hog is gone it needs hardly any of a processor that other tests may take too
    starved = (f"import os, time\nos.sched_setaffinity(0, {{{cpu}}})\nos.nice(19)\nend = time.monotonic() + 4\n"
               "while time.monotonic() < end: pass\nprint('done')")
    waiting = "import time\ntime.sleep(5)\nprint('done')"
    limits = Limits(cpu_s=2, wall_s=3.0)  # and 18 s by the clock, which other tests may take too
    try:
        outcome = run_program("python", starved, limits)
    finally:
        hog.kill()
        hog.wait()
    assert (outcome.status, outcome.stdout) == ("ok", b"done\n") and outcome.seconds > 3.0
    assert run_program("python", waiting, limits).status == "timeout"


@needs_sandbox
@pytest.mark.parametrize(("each_s", "cpu_s", "status"), [(0.45, 0.5, "timeout"), (0.25, 4.0, "ok")])
def test_processor_time_counts_in_fractions_and_over_all_processes(each_s, cpu_s, status):
    """None of the four processes passes the limit by itself."""
    source = ("import os, time\nchildren = [os.fork() for _ in range(2)]\n"
              f"while time.process_time() < {each_s}: pass\nif 0 not in children:\n    os.wait(); os.wait()\n")
    assert run_program("python", source, Limits(cpu_s=cpu_s)).status == status


@needs_sandbox
@pytest.mark.parametrize("word", ["bwrap", "prlimit", "setpriv", "setsid"])
def test_what_a_program_says_is_not_taken_for_the_sandbox(word):
    outcome = run_program("python", f"import sys\nprint('{word}: no', file=sys.stderr)\nsys.exit(1)", ROOMY)
    assert (outcome.status, outcome.message) == ("runtime_error", f"{word}: no")


@needs_sandbox
@pytest.mark.parametrize("file", ["..", "out of memory/.."])
def test_a_sandbox_that_fails_is_told_from_a_program_that_does(file):
    with pytest.raises(RuntimeError, match="the sandbox failed: bwrap: "):
        Bubblewrap().run(["/usr/bin/true"], {file: b""}, limits=ROOMY)


@needs_sandbox
def test_files_of_the_host_are_never_counted_while_the_root_changes(monkeypatch):
    """bwrap mounts a file system over the host's /tmp and then makes it its root. Here it goes after the first look."""
    changes = "mount -t tmpfs own /tmp && echo mounted && read -r _ && umount -l /tmp && echo gone && read -r _"
    with subprocess.Popen(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", changes], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        def looked_at(look):
            def then_the_root_changes(path, *arguments, **options):
                found = look(path, *arguments, **options)
                if path != "/tmp" and not gone:
                    process.stdin.write("\n")
                    process.stdin.flush()
                    gone.append(process.stdout.readline())
                return found
            return then_the_root_changes

        gone = []
        assert process.stdout.readline() == "mounted\n"
        monkeypatch.setattr(os, "stat", looked_at(os.stat))
        monkeypatch.setattr(os, "fstat", looked_at(os.fstat))
        found = watch._files(process.pid)
        monkeypatch.undo()
        process.communicate("\n")
    assert gone == ["gone\n"] and found < 10


@needs_sandbox
def test_standard_error_costs_nothing_and_its_end_is_kept():
    outcome = run_program("python", "import sys\nsys.stderr.write('x' * 3_000_000 + 'end')\nprint('fine')", ROOMY)
    assert (outcome.status, outcome.stdout) == ("ok", b"fine\n") and outcome.stderr.endswith(b"xend")


def _without(wall: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes one wall down."""
    walls, placed = box._walls, box._placed
    nothing_denied = struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)  # one instruction: allow
    if wall == "seccomp":
        monkeypatch.setattr(box, "deny_filter", lambda: nothing_denied)
    elif wall == "cover of /proc/1":
        monkeypatch.setattr(box, "_memory", lambda path, size: () if path == "/proc/1" else ("--tmpfs", path))
        monkeypatch.setattr(box, "_placed", lambda data: [word for word in placed(data) if word not in (
            "--remount-ro", "/proc/1", "/dev", "/")])
    elif wall == "read-only root":
        monkeypatch.setattr(box, "_placed", lambda data: placed(data)[:-2])
    elif wall == "empty environment":
        monkeypatch.setattr(box, "ENVIRONMENT", box.ENVIRONMENT | {"CANARY": SECRET})
    elif wall == "process name space":
        monkeypatch.setattr(box, "_walls", lambda limits: ["--unshare-net", "--unshare-uts", *walls(limits)[1:]])
    elif wall == "limit of processes":
        commands = Limits.commands
        monkeypatch.setattr(Limits, "commands", lambda limits: [w for w in commands(limits) if "nproc" not in w])
    elif wall == "watch over memory":
        monkeypatch.setattr(watch._Meter, "sample",
                            lambda meter: "timeout" if time.monotonic() - meter._started > 1.0 else "")
    else:
        monkeypatch.setattr(box, "_memory", lambda path, size: ("--tmpfs", path))


@pytest.mark.slow
@needs_sandbox
@pytest.mark.parametrize(("wall", "name"), [
    ("seccomp", "sockets of every family"), ("seccomp", "ptrace"),
    ("cover of /proc/1", "the memory of the first process"),
    ("read-only root", "a full root"), ("empty environment", "the environment"),
    ("process name space", "/proc of the host"), ("limit of processes", "zombies that nobody waits for"),
    ("watch over memory", "memory in many processes"), ("size of /tmp", "a full /tmp")])
def test_each_wall_is_needed_and_its_absence_seen(wall, name, host, monkeypatch):
    attack = next(attack for attack in ATTACKS if attack.name == name)
    source = host.fill_in(attack.source)
    assert _held(attack, run_program("python", source, ROOMY))
    _without(wall, monkeypatch)
    assert not _held(attack, run_program("python", source, ROOMY))


def _held(attack: Attack, outcome: Outcome) -> bool:
    output = outcome.stdout + outcome.stderr
    return b"ESCAPED" not in output and SECRET.encode() not in output and outcome.status in attack.status and (
        "ok" not in attack.status or b"held" in outcome.stdout)
