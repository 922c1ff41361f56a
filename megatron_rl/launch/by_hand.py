"""`megatron-rl torchrun`: one run on several machines without a scheduler that we know. It runs the orchestrator here.

The user, or another scheduler, runs <run.dir>/torchrun.sh on every machine of the trainer. Engines run already
(rollout.engine.urls). When the orchestrator ends without having finished, the ranks are told by the run's lease.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rl.compat.own_name import check_own_name
from megatron_rl.config.load import to_dict
from megatron_rl.config.orchestrator import RUN_KEY
from megatron_rl.config.rollout import ENGINE_KEY, is_loopback
from megatron_rl.config.schema import Config, require
from megatron_rl.launch.hosts import check_tensor
from megatron_rl.launch.keys import check_keys
from megatron_rl.launch.local import (
    RunFailed,
    RunInterrupted,
    after_start,
    check_disk,
    check_still_there,
    engines_for,
    follow,
    how_to_go_on,
    how_to_resume,
    rank_environment,
    terminable,
)
from megatron_rl.launch.programs import OrchestratorFailed, OrchestratorKeeper, prepared, started
from megatron_rl.launch.slurm import CARRIED
from megatron_rl.loop import Ended
from megatron_rl.observe import lease
from megatron_rl.observe.files import write_json
from megatron_rl.orchestrator import stages, state
from megatron_rl.rollout.ports import choose_port, is_here

SCRIPT = "torchrun.sh"
MASTER_PORTS = range(29500, 29600)
"""torchrun's own, and the next ones."""


@dataclass(frozen=True)
class Machines:
    """Where the ranks run. master: HOST or HOST:PORT of the machine with number 0; None for this one."""

    nodes: int
    master: str | None = None


def check(config: Config, machines: Machines) -> Config:
    """`config` with the name under which the ranks reach the orchestrator. ValueError for what cannot run by hand."""
    world, nodes, engine = config.parallel.world_size, machines.nodes, config.rollout.engine
    require(world % nodes == 0, f"--nodes {nodes} does not divide parallel.world_size={world}: nodes run equally many "
            "ranks")
    require(not config.stages, "stages: ranks that are started by hand are started once; run each stage by itself, or "
            "use `megatron-rl slurm`")
    require(bool(engine.urls), "rollout.engine.urls is empty: start the engines first, with `megatron-rl engine` on "
            "their machines, and name them here")
    require(engine.router != "local", "rollout.engine.router=local is started with the engines: give its URL")
    host, _ = _place(machines)
    if nodes == 1 and is_here(host):
        check_tensor(config)
        return config
    for url in engine.urls:
        require(not is_loopback(url.split("://")[-1].rsplit(":", 1)[0].strip("[]")),
                f"rollout.engine.urls: {url} leads every machine to itself: give the name of the engine's machine")
    require(config.rollout.publish != "tensor", "rollout.publish=tensor goes through the memory of one machine: choose "
            "broadcast or disk")
    options = config.orchestrator
    if is_loopback(options.host):
        options = replace(options, host=socket.gethostname())
    if options.host == socket.gethostname():
        check_own_name()
    return replace(config, orchestrator=options)


def run(config: Config, machines: Machines, tell: Callable[[str], None]) -> Ended:
    """The run, from here to its end. RunFailed or RunInterrupted. tell: is told how the ranks are started."""
    run_dir = Path(config.run.dir)
    check_disk(run_dir)
    check_keys(config.rollout.engine)
    lease.take(run_dir)
    config, launch = prepared(config), run_dir / "launch.json"
    write_json(launch, to_dict(config))
    host, port = _master(machines)
    script = write_script(config, machines.nodes, host, port)
    others = f", 1 to {machines.nodes - 1} on the others" if machines.nodes > 1 else ""
    tell(f"start the ranks on {machines.nodes} machines: bash {script} NUMBER, with NUMBER 0 on {host}{others}")
    log = run_dir / "orchestrator.log"
    with after_start(), terminable():
        keeper = OrchestratorKeeper(config.orchestrator, log, lambda: started(
            [sys.executable, "-m", "megatron_rl.orchestrator", str(launch)], log,
            rank_environment() | {"CUDA_VISIBLE_DEVICES": ""}))
        try:
            keeper.start()
            follow(keeper, "rl", config, look=keeper.look)
        except KeyboardInterrupt:
            raise RunInterrupted(f"stopped; {how_to_resume(run_dir)}") from None
        except OrchestratorFailed as failed:
            raise RunFailed(f"{failed}\n{how_to_go_on(run_dir, str(failed))}") from failed
        finally:
            keeper.stop()
            check_still_there(run_dir)
            ended = state.read_end(run_dir / state.FOLDER)
            with contextlib.suppress(lease.Superseded):  # then the script and the ranks are a newer start's
                lease.check(run_dir)
                script.unlink(missing_ok=True)  # its keys are void
                if ended is None:
                    lease.take(run_dir, over=True)  # ranks that still wait end now
    if ended is None:
        raise RunFailed(f"the orchestrator ended before the run; see {log}. {how_to_resume(run_dir)}")
    return ended[0]


def serve_engines(config: Config, tell: Callable[[str], None]) -> None:
    """rollout.engine.count servers on this machine until Ctrl-C. tell: is told what other commands need of them."""
    engine, log = config.rollout.engine, Path(config.run.dir) / f"engine-{socket.gethostname()}.log"
    require(not engine.urls, "rollout.engine.urls names servers that run already: leave it out")
    drawn = engine.api_key_env == ENGINE_KEY and ENGINE_KEY not in os.environ
    require(drawn or engine.api_key_env in os.environ,
            f"rollout.engine.api_key_env={engine.api_key_env}: that environment variable is not set")
    if not is_loopback(engine.host):
        check_own_name(engine.host)
    with engines_for(stages.widest(config), config.model.path, log) as served:
        if drawn:
            tell(f"export {ENGINE_KEY}={os.environ[ENGINE_KEY]}")
        tell(f"rollout.engine.urls=[{','.join(served.rollout.engine.urls)}]")
        tell(f"serving {config.model.path} until Ctrl-C; log: {log}")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def write_script(config: Config, nodes: int, host: str, port: int) -> Path:
    """Writes <run.dir>/torchrun.sh, which nobody else may read: it holds the keys of the run and of its engines.

    The file appears whole, so whoever waits for it may run it at once.
    """
    environment = rank_environment()
    names = [*CARRIED, RUN_KEY, config.rollout.engine.api_key_env, lease.START_NUMBER]
    exports = [f"export {name}={shlex.quote(environment[name])}" for name in names if name in environment]
    ranks = shlex.join([
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--node-rank=NUMBER",
        f"--nproc-per-node={config.parallel.world_size // nodes}", f"--master-addr={host}",
        f"--master-port={port}", "-m", "megatron_rl.train", "rl", str(Path(config.run.dir).absolute() / "launch.json")])
    path = Path(config.run.dir).absolute() / SCRIPT
    partial = path.with_name(SCRIPT + ".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write("\n".join([
            "#!/bin/bash", f"# This machine's ranks: bash {path} NUMBER, from 0 to {nodes - 1}; 0 on {host}.",
            "# It holds the keys of one start of the run: the next start writes it anew.", "set -e",
            f"cd {shlex.quote(str(Path.cwd()))}", *exports,
            "exec " + ranks.replace("--node-rank=NUMBER", '--node-rank="${1:?the number of this machine}"'), ""]))
    os.replace(partial, path)
    return path


def _place(machines: Machines) -> tuple[str, int | None]:
    """Host and port of --master; a port of None is still to be found. ValueError for another form."""
    if machines.master is None:
        return ("127.0.0.1" if machines.nodes == 1 else socket.gethostname()), None
    host, colon, port = machines.master.partition(":")
    require(host and (not colon or (port.isdecimal() and 1 <= int(port) <= 65535)),
            f"--master {machines.master}: give HOST or HOST:PORT, with a port from 1 to 65535")
    return host, int(port) if colon else None


def _master(machines: Machines) -> tuple[str, int]:
    """Where rank 0 listens for the others; a free port if that is on this machine."""
    host, port = _place(machines)
    if is_here(host):
        return host, choose_port(port, host=host, key="the port of --master", ports=MASTER_PORTS)
    return host, port or MASTER_PORTS.start
