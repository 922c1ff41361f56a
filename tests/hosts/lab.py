"""Several machines on one, for tests: hosts n1, n2, ... in namespaces of their own, joined by one switch.

Each host has its own address, name, processes, loopback, /dev/shm, /run and /tmp. Shared are the folder `shared` (the
cluster's file system), the checkout and the rest of this machine. No route leads out. Cables can be cut and healed,
hosts can lose power; `start_slurm` makes a Slurm cluster of them. Everything lives in child processes that the kernel
kills when this process ends, and the namespaces with them: nothing is left behind, however a test ends.

As root, with iproute2 (ip) and util-linux (unshare, nsenter); `why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from megatron_rl.rollout.die_with_parent import with_parent

ROOT = Path(__file__).resolve().parents[2]
PROXIES = {f"{name}_proxy": "" for name in ("http", "https", "HTTP", "HTTPS")}
PRIVATE = Path("/tmp/own")
"""A folder that each host has for itself."""
SLURM_DEAD_S = 20

HOST = """
set -e
mount --make-rprivate /
for folder in {shared}; do
    case $folder in /tmp/*)
        inside={state}/tmp${{folder#/tmp}}
        mkdir -p $inside; mount --bind $folder $inside
    esac
done
mount --bind {state}/hosts /etc/hosts
mount --bind {state}/run /run
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount --rbind {state}/tmp /tmp
hostname {name}
ip link set lo up
touch {state}/ready
trap : CHLD
while :; do sleep 3600 & wait || true; done
"""

SLURM_CONF = """
ClusterName=lab
SlurmctldHost={control}({control_address})
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/socket,cred_expire=10
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
StateSaveLocation={state}/ctld
SlurmdSpoolDir=/run/slurmd
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd-%n.log
SlurmdTimeout={dead_s}
InactiveLimit=0
KillWait=4
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
{nodes}
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not(*, slurm: bool = False) -> str | None:
    """Why this machine can hold no lab, or none with Slurm; None if it can."""
    if os.getuid() != 0:
        return "hosts in network namespaces need root"
    packages = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
    if slurm:
        packages |= {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
    lacking = sorted({package for command, package in packages.items() if shutil.which(command) is None})
    if lacking:
        return f"needs Debian's packages {', '.join(lacking)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "ip", "link", "add",
                            "end0", "type", "veth", "peer", "name", "end1"], capture_output=True, text=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Lab:
    """`with Lab(folder, hosts=3) as lab:`; folder: empty, it becomes the shared file system."""

    def __init__(self, shared: Path, hosts: int = 3):
        self.shared, self.hosts = shared, [f"n{number + 1}" for number in range(hosts)]
        self.state = shared / "state"
        self._switch: subprocess.Popen | None = None
        self._outer: dict[str, subprocess.Popen] = {}
        self._init: dict[str, int] = {}
        self._jobs: list[subprocess.Popen] = []

    def __enter__(self) -> Lab:
        self._switch = subprocess.Popen(with_parent(["unshare", "--net", "sleep", "infinity"]))
        wait_until(lambda: _namespace(self._switch.pid) != _namespace(os.getpid()), "the switch")
        self._on_switch("link", "add", "switch", "type", "bridge")
        self._on_switch("link", "set", "switch", "up")
        try:
            for host in self.hosts:
                self.boot(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for host in self.hosts:
            self.halt(host)
        self._switch.kill()
        self._switch.wait()
        for job in self._jobs:
            job.wait()

    # ---- hosts and cables --------------------------------------------------------------------------------

    def address(self, host: str) -> str:
        return f"10.77.0.{host[1:]}"

    def boot(self, host: str) -> None:
        state = self.state / host
        shutil.rmtree(state, ignore_errors=True)
        for name in ("run", "tmp"):
            (state / name).mkdir(parents=True)
        (state / "tmp").chmod(0o1777)
        names = [f"{self.address(other)} {other}" for other in self.hosts]
        (state / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        shared = " ".join(str(folder) for folder in dict.fromkeys((self.shared, ROOT, Path(sys.prefix).resolve())))
        script = HOST.format(name=host, shared=shared, state=state)
        with (self.state / f"{host}.log").open("ab") as log:
            outer = subprocess.Popen(
                with_parent(["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc",
                             "--kill-child", "bash", "-c", script]), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._outer[host] = outer
        wait_until(lambda: (state / "ready").exists() or outer.poll() is not None, f"{host} to boot")
        assert outer.poll() is None, (self.state / f"{host}.log").read_text()
        self._init[host] = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
        port = f"to_{host}"
        self._on_switch("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(self._init[host]))
        self._on_switch("link", "set", port, "master", "switch", "up")
        for words in (["addr", "add", f"{self.address(host)}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            self.run(host, "ip", *words)

    def halt(self, host: str) -> None:
        """Its power is cut: all its processes are gone, and nothing says goodbye over the cable."""
        if (outer := self._outer.pop(host, None)) is not None:
            self.cut(host)
            outer.kill()
            outer.wait()
            subprocess.run(self._switch_command("link", "del", f"to_{host}"), capture_output=True)

    def cut(self, host: str) -> None:
        """Pulls the host's cable out of the switch."""
        self._on_switch("link", "set", f"to_{host}", "down")

    def heal(self, host: str) -> None:
        self._on_switch("link", "set", f"to_{host}", "up")

    def name_like_debian(self, host: str) -> None:
        """From now on the host's own name is 127.0.1.1 there, as Debian's installer writes it."""
        file = self.state / host / "hosts"
        file.write_text(f"127.0.1.1 {host}\n{file.read_text()}")  # in place: it is bound to /etc/hosts

    def _switch_command(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self._switch.pid), "--net", "ip", *words]

    def _on_switch(self, *words: str) -> None:
        done = subprocess.run(self._switch_command(*words), capture_output=True, text=True)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"

    # ---- what runs on them -------------------------------------------------------------------------------

    def command(self, host: str, words: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self._init[host]), "--net", "--uts", "--mount", "--ipc", "--pid", "--",
                "env", "-C", str(self.shared), *words]

    def processes_of(self, host: str, mark: str) -> list[str]:
        """Command lines of Python programs on the host in which `mark` occurs."""
        inside, found = os.readlink(f"/proc/{self._init[host]}/ns/pid"), []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or ())
            with contextlib.suppress(OSError):
                if mark in line and "python" in line and os.readlink(f"/proc/{process.pid}/ns/pid") == inside:
                    found.append(line)
        return found

    def environment(self) -> dict[str, str]:
        return os.environ | PROXIES | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/tmp",
            "SLURM_CONF": str(self.state / "slurm.conf")}

    def run(self, host: str, *words: str, environment: Mapping[str, str] | None = None,
            timeout_s: float = 120.0) -> str:
        """What the command printed, both streams. It must end well."""
        done = subprocess.run(self.command(host, words), env=self.environment() | dict(environment or {}), text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=timeout_s)
        assert done.returncode == 0, f"{words} on {host}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def start(self, host: str, *words: str, log: Path,
              environment: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Starts the command and returns its process, which ends when the command does."""
        with log.open("ab") as file:
            process = subprocess.Popen(self.command(host, words), env=self.environment() | dict(environment or {}),
                                       stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self._jobs.append(process)
        return process

    # ---- Slurm -------------------------------------------------------------------------------------------

    def start_slurm(self, control: str) -> None:
        """munge and slurmd on all hosts, the controller on `control`."""
        (self.state / "ctld").mkdir(exist_ok=True)
        nodes = "\n".join(f"NodeName={host} NodeAddr={self.address(host)} CPUs=16 State=UNKNOWN" for host in self.hosts)
        (self.state / "slurm.conf").write_text(SLURM_CONF.format(
            control=control, control_address=self.address(control), state=self.state, nodes=nodes, dead_s=SLURM_DEAD_S))
        (self.state / "munge.key").write_bytes(os.urandom(1024))
        (self.state / "munge.key").chmod(0o400)
        for host in self.hosts:
            self._start_munge(host)
        self.run(control, "slurmctld")
        for host in self.hosts:
            self.run(host, "slurmd", "-N", host)
        self.wait_for_idle(control)

    def wait_for_idle(self, control: str) -> None:
        """Until no node runs a job or cleans up after one: the next job gets the first nodes."""
        wait_until(lambda: len(self.run(control, "sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())
                   == len(self.hosts), "all nodes to be idle")

    def _start_munge(self, host: str) -> None:
        daemon = " ".join(["munged", "-S", "/run/munge/socket", "--key-file=/run/munge/key",
                           "--pid-file=/run/munge/pid", "--log-file=/run/munge/log", "--seed-file=/run/munge/seed"])
        self.run(host, "bash", "-c", f"mkdir -p /run/munge /run/slurmd && cp {self.state}/munge.key /run/munge/key && "
                 f"chown -R munge:munge /run/munge && chmod 755 /run /run/munge && su -s /bin/sh munge -c "
                 f"'PATH=$PATH:/usr/sbin {daemon}' >/run/munge/said 2>&1")


def wait_until(true: Callable[[], object], what: str, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.1)


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")
