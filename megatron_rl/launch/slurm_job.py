"""The batch script's body: engines, orchestrator and ranks up, and what to do when they end: `slurm_job LAUNCH.json`.

 - The time limit nears, or the job is preempted: Slurm signals us (--signal=B:USR1) or all steps (SIGTERM); the
   orchestrator has the ranks save after the step, the run ends as stopped, and the job goes back into the queue.
 - The orchestrator is killed or hangs: it is started again while the ranks wait.
 - A stage of the run ends: the next one begins in the same job.
 - A node fails: the run goes on as a new job that excludes it, at most slurm.max_restarts times.
 - A job that is not the run's first start goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.compat.own_name import check_own_name
from megatron_rl.config.load import from_json, to_dict
from megatron_rl.config.schema import Config
from megatron_rl.launch.claim import claimed
from megatron_rl.launch.hosts import why_unreachable
from megatron_rl.launch.keys import check_keys
from megatron_rl.launch.programs import EXIT_CODES, OrchestratorFailed, OrchestratorKeeper, prepared
from megatron_rl.loop import End
from megatron_rl.observe import lease
from megatron_rl.observe.files import write_json
from megatron_rl.orchestrator import stages, state
from megatron_rl.rollout.engine_command import draw_key, engine_key
from megatron_rl.rollout.ports import PORTS, choose_port

POLL_S = 0.5
HARDWARE = re.compile(r"uncorrectable (?:ECC|NVLink)|CUDA error: (?:unknown error|hardware)|NVRM: Xid|fell off the bus",
                      re.IGNORECASE)
"""In a rank's log: the machine's fault, not the program's."""
MASTER_PORTS = range(10000, PORTS.start)
"""Below the ports of engines, which may run beside rank 0, and those that the kernel hands out."""
RANK_LOG = re.compile(r"rank-(\d+)\.log")
FAULTS, EXCLUDED = "MEGATRON_RL_FAULTS", "MEGATRON_RL_EXCLUDED_NODES"
"""Environment of a job that replaces one whose node failed."""


class Job:
    """One run of the job; a requeue makes a new one."""

    def __init__(self, launch: Path):
        self.folder = launch.parent
        self.config = from_json(launch)
        self.id = os.environ["SLURM_JOB_ID"]
        self.faults = int(os.environ.get(FAULTS, "0"))
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + self.faults
        self.stop_asked = False
        hosts = output(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()
        slurm = self.config.slurm
        self.trainer_hosts = hosts[:slurm.nodes]
        self.engine_hosts = hosts[slurm.nodes:] or self.trainer_hosts
        self.several = len(hosts) > 1
        self.engines: list[subprocess.Popen] = []
        self.read_to = {path: path.stat().st_size for path in self.rank_logs()}  # logs of earlier starts end here

    def run(self) -> int:
        """Exit code of the job; 0 also when it has been requeued."""
        signal.signal(signal.SIGUSR1, lambda *_: self.ask_to_stop())
        say(f"job {self.id}, start {self.restarts + 1}, trainers on {','.join(self.trainer_hosts)}, "
            f"engines on {','.join(self.engine_hosts)}")
        try:
            code = self.work()
            lease.check(self.config.run.dir)  # a requeue would stop the newer start of the job
        except lease.Superseded as error:
            say(str(error))
            return lease.EXIT_CODE
        return self.after(code)

    def work(self) -> int:
        """Exit code of the run; 1 if it could not start, as when preemption takes the engines before they answer."""
        run_dir = self.config.run.dir
        try:
            if self.several:
                check_own_name(self.trainer_hosts[0])
                self.check_shared()
            with claimed(run_dir, job=self.id):
                lease.take(run_dir)
                return self.run_programs(self.start_engines())
        except SystemExit as failed:
            say(str(failed))
            return 1
        finally:
            for engine in self.engines:
                engine.terminate()

    def check_shared(self) -> None:
        """SystemExit, naming node and path, if a node of the job does not see its folder or, with ranks, the model.

        The look is taken inside slurm.container, if there is one.
        """
        nodes = [*self.trainer_hosts, *(host for host in self.engine_hosts if host not in self.trainer_hosts)]
        needed = [str((self.folder / "launch.json").absolute()), str(Path(self.config.model.path).absolute())]
        inside, options = contained(self.config, [
            "bash", "-c", 'for path; do [ -r "$path" ] || echo "$(hostname) does not see $path"; done', "shared",
            *needed])
        done = subprocess.run(
            ["srun", "--overlap", "--job-name=shared", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}",
             "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}", *options, *inside], capture_output=True, text=True)
        blind = [line for line in done.stdout.splitlines() if " does not see " in line]  # a cluster's prolog speaks too
        if blind:
            raise SystemExit(f"{'; '.join(sorted(blind))}: run.dir and model.path must be folders that all nodes share")
        if done.returncode:
            raise SystemExit(f"srun could not look at the folders on {','.join(nodes)}: {done.stderr.strip()}")

    def start_engines(self) -> tuple[str, ...]:
        """URLs of the engines that answer here, once all have answered or failed; SystemExit if none does.

        A given rollout.engine.urls is used as it is.
        """
        if self.config.rollout.engine.urls:
            check_keys(self.config.rollout.engine)
            return self.config.rollout.engine.urls
        draw_key(self.config.rollout.engine)  # the steps inherit it
        waiting = set(range(self.config.rollout.engine.count))
        for index in waiting:
            self.url_file(index).unlink(missing_ok=True)
            host = self.engine_host(index)
            self.engines.append(self.step(
                f"engine-{index}", place_on(host),
                [sys.executable, "-m", "megatron_rl.launch.slurm_step", "engine", str(self.folder / "launch.json"),
                 str(index), str(index // len(self.engine_hosts)), host if self.several else "127.0.0.1"]))
        urls: dict[int, str] = {}
        while waiting:
            self.look_at_lease()
            for index in sorted(waiting):
                url, code = self.url_of(index), self.engines[index].poll()
                if url is None and code is None:
                    continue
                waiting.remove(index)
                if url is not None and (why := why_unreachable(url, engine_key(self.config.rollout.engine))) is None:
                    urls[index] = url
                    continue
                self.engines[index].terminate()
                why = why if url is not None else (f"ended with exit code {code} before it answered: "
                                                   f"{last_line(self.folder / f'engine-{index}.log')}")
                say(f"engine {index} on {self.engine_host(index)} {why}; see {self.folder}/"
                    f"engine-{index}.log and engine-{index}.server.log")
            time.sleep(POLL_S)
        if not urls:
            raise SystemExit("no engine could be started")
        if len(urls) < len(self.engines):
            say(f"the run goes on with {len(urls)} of rollout.engine.count={len(self.engines)} engines")
        return tuple(urls[index] for index in sorted(urls))

    def look_at_lease(self) -> None:
        """Superseded if a newer start has taken run.dir. A file system that is away for a while ends nothing."""
        if (why := lease.superseded(self.config.run.dir)) is not None:
            raise lease.Superseded(why)

    def place_of_ranks(self) -> list[str]:
        """Where srun puts the ranks: equally many on every node, in the order of the nodes."""
        world, nodes = self.config.parallel.world_size, len(self.trainer_hosts)
        return [f"--nodes={nodes}", f"--ntasks={world}", f"--ntasks-per-node={world // nodes}", "--distribution=block",
                f"--nodelist={','.join(self.trainer_hosts)}"]

    def engine_host(self, index: int) -> str:
        return self.engine_hosts[index % len(self.engine_hosts)]

    def url_file(self, index: int) -> Path:
        return self.folder / f"engine-{index}.url"

    def url_of(self, index: int) -> str | None:
        return self.url_file(index).read_text() if self.url_file(index).exists() else None

    def run_programs(self, urls: tuple[str, ...]) -> int:
        """Exit code of the run, with stages of all of them; STOPPED when a signal came before it started."""
        config = with_engines(self.config, urls, resume=self.restarts > 0)
        while not self.stop_asked:
            code, is_last = self.run_stage(config)
            if code or is_last:
                return code
            config = stages.resumed(config)
        return EXIT_CODES[End.STOPPED]

    def run_stage(self, config: Config) -> tuple[int, bool]:
        """(exit code, whether no stage is left) of one start of the orchestrator and all ranks."""
        several = len(self.trainer_hosts) > 1
        config = prepared(config, host=self.trainer_hosts[0] if several else None)  # the steps inherit the run's key
        port = choose_port(None, host=self.trainer_hosts[0] if several else "127.0.0.1", ports=master_ports(self.id))
        path = self.folder / "ranks.json"
        write_json(path, to_dict(config))
        environment = {"MASTER_ADDR": self.trainer_hosts[0] if several else "127.0.0.1",
                       "MASTER_PORT": str(port)}
        keeper = OrchestratorKeeper(config.orchestrator, self.folder / "orchestrator.log", lambda: self.step(
            "orchestrator", place_on(self.trainer_hosts[0]),
            [sys.executable, "-m", "megatron_rl.launch.slurm_step", "orchestrator", str(path)],
            {"CUDA_VISIBLE_DEVICES": ""}))
        keeper.start()
        ranks = self.step(
            "rank", [*self.place_of_ranks(), "--kill-on-bad-exit=1"],
            [sys.executable, "-m", "megatron_rl.launch.slurm_step", "rank", str(path)], environment)
        try:
            while (code := wait(ranks, POLL_S)) is None:
                keeper.look()
                self.look_at_lease()
            if code == 0:
                keeper.wait_for_end()
        except lease.Superseded:  # the programs see it too; srun may wait for a controller that is out of reach
            ranks.kill()
            keeper.stop(grace_s=0.0)
            raise
        except OrchestratorFailed as failed:
            say(str(failed))
            ranks.terminate()
            return 1, True
        finally:
            keeper.stop()
        ended = state.read_end(Path(config.run.dir) / state.FOLDER)
        if code or ended is None:
            return code or 1, True
        if ended[0].why:
            say(f"the run ended early: {ended[0].why}")
        return EXIT_CODES[ended[0].how], ended[1]

    def step(self, name: str, placing: Sequence[str], command: Sequence[str],
             environment: dict[str, str] | None = None) -> subprocess.Popen:
        """One `srun`; its output is one log per task. --overlap: engines and ranks may share a node."""
        log = self.folder / (f"{name}-%t.log" if name == "rank" else f"{name}.log")
        inside, options = contained(self.config, command)
        cpus = f"--cpus-per-task={self.config.slurm.cpus_per_task}"  # srun does not take it over from sbatch
        srun = ["srun", "--overlap", cpus, f"--job-name={name}",
                f"--output={log}", "--open-mode=append", *placing, *options]
        with open(self.folder / f"{name}.srun.log", "ab") as errors:
            return subprocess.Popen([*srun, *inside], env=os.environ | (environment or {}), stderr=errors,
                                    stdin=subprocess.DEVNULL, start_new_session=name == "orchestrator")

    def ask_to_stop(self) -> None:
        """SIGUSR1 to the orchestrator's step, not to srun, which would kill its task."""
        say("asked to stop: the run saves after this step")
        self.stop_asked = True
        steps = subprocess.run(["squeue", "--steps", "--noheader", "--format=%i %j", f"--jobs={self.id}"],
                               capture_output=True, text=True)
        if steps.returncode:
            say(f"the signal could not be passed on: {steps.stderr.strip()}")
        for line in steps.stdout.splitlines():
            step, name = line.split()
            if name == "orchestrator":
                subprocess.run(["scancel", "--signal=USR1", step], check=False)

    def after(self, code: int) -> int:
        if code in (0, EXIT_CODES[End.UNFILLABLE]):
            say("done")
            return code
        if code == EXIT_CODES[End.STOPPED]:
            say("saved; back into the queue")
            return requeue(self.id)
        if self.preempted():
            say("preempted; back into the queue")
            return requeue(self.id)
        bad = sorted(self.failed_nodes())
        if bad and self.faults < self.config.slurm.max_restarts:
            return self.resubmit_without(bad)
        logs = [path.name for path in sorted(self.folder.glob("*.log")) if path.stat().st_size
                and path.name.startswith(("rank", "orchestrator"))]
        say(f"the run ended with exit code {code}; see {self.folder}: {', '.join(logs) or 'there is no log of a rank'}")
        return code

    def resubmit_without(self, bad: Sequence[str]) -> int:
        """A new job for the rest of the run: Slurm lets a job's excluded nodes be changed only while it waits."""
        known = os.environ.get(EXCLUDED) or self.config.slurm.exclude
        excluded = ",".join([known, *bad] if known else bad)
        job = output(["sbatch", "--parsable", f"--exclude={excluded}", str(self.folder / "job.sh")],
                     {EXCLUDED: excluded, FAULTS: str(self.faults + 1), "SLURM_RESTART_COUNT": "0"}).strip()
        say(f"{','.join(bad)} failed: excluded; goes on as job {job}")
        return 0

    def failed_nodes(self) -> set[str]:
        """Nodes whose ranks ended with a fault of the machine in their log."""
        text = {path: path.read_bytes()[self.read_to.get(path, 0):].decode(errors="replace")
                for path in self.rank_logs()}
        per_node = self.config.parallel.world_size // len(self.trainer_hosts)
        return {self.trainer_hosts[int(found.group(1)) // per_node] for path, part in text.items()
                if (found := RANK_LOG.fullmatch(path.name)) and HARDWARE.search(part)}

    def rank_logs(self) -> list[Path]:
        return sorted(self.folder.glob("rank*.log"))

    def preempted(self) -> bool:
        """Whether Slurm is taking our nodes away. It requeues a job that it kills, not one that ends by itself."""
        about = output(["scontrol", "show", "job", self.id])
        found = re.search(r"PreemptTime=(\S+)", about)
        return found is not None and found.group(1) not in ("None", "N/A", "Unknown")


def master_ports(job: str) -> list[int]:
    """Where rank 0 of the job may listen for the others, best first; neighbouring jobs begin with other ports."""
    first = int(job) % len(MASTER_PORTS)
    return [*MASTER_PORTS[first:], *MASTER_PORTS[:first]]


def last_line(log: Path) -> str:
    """The last words of a step's log, without what srun itself says of the step's end."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("srun:")), "no words")


def place_on(host: str) -> list[str]:
    return ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={host}"]


def with_engines(config: Config, urls: tuple[str, ...], *, resume: bool) -> Config:
    engine = dataclasses.replace(config.rollout.engine, urls=urls)
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=engine),
                               run=dataclasses.replace(config.run, resume="auto" if resume else config.run.resume))


def contained(config: Config, command: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the command as srun gets it, more options of srun) for slurm.container."""
    slurm = config.slurm
    if slurm.container == "pyxis":
        mounts = [f"--container-mounts={','.join(slurm.container_mounts)}"] if slurm.container_mounts else []
        return list(command), [f"--container-image={slurm.container_image}", *mounts]
    if slurm.container == "apptainer":
        binds = [f"--bind={mount}" for mount in slurm.container_mounts]
        gpus = ["--nv"] if slurm.gpus_per_node else []
        return ["apptainer", "exec", *gpus, *binds, str(slurm.container_image), *command], []
    return list(command), []


def requeue(job: str) -> int:
    return subprocess.run(["scontrol", "requeue", job], check=False).returncode


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Exit code, None if it still runs; signals that we handle meanwhile do not end the wait."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def output(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def say(text: str) -> None:
    print(f"megatron-rl: {time.strftime('%F %T')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(Job(Path(sys.argv[1])).run())
