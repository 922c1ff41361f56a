"""One machine: SGLang engines and the trainer's ranks, started together and stopped together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import torch

from megatron_rl.compat.cuda import SAME_IN_RANKS_AND_ENGINES
from megatron_rl.config.load import to_dict
from megatron_rl.config.resources import SOURCE_TREE
from megatron_rl.config.rollout import is_loopback
from megatron_rl.config.schema import Config
from megatron_rl.launch.keys import check_keys
from megatron_rl.model.adapters import adapted_modules
from megatron_rl.model.architectures import read_config
from megatron_rl.model.checkpoint_files import choose, saved_steps, step_of
from megatron_rl.model.hf_folder import refuse_code
from megatron_rl.observe import RunProgress
from megatron_rl.observe.files import write_json
from megatron_rl.observe.timing import PhaseFile
from megatron_rl.preflight_gpu import check_engines, on_gpus_here
from megatron_rl.rollout.die_with_parent import with_parent
from megatron_rl.rollout.engine_command import draw_key
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.router import router_process
from megatron_rl.rollout.scratch import check_tmpdir, make_scratch
from megatron_rl.rollout.supervisor import NOTHING_PUBLISHED, Supervisor

STOP_GRACE_S = 20.0
POLL_S = 0.3
MIN_FREE_BYTES = 1 << 30
LOG_LINES_SHOWN = 8
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")
FAULT_OF_INPUT = re.compile(r"^(?:ValueError|TypeError|KeyError|IndexError|AttributeError|AssertionError|"
                            r"NotImplementedError|ImportError|ModuleNotFoundError|ZeroDivisionError)\b", re.MULTILINE)
"""Last line of a traceback that the same input would bring about again."""
KILLED = re.compile(r"exitcode\s*: -9 ")


class RunFailed(RuntimeError):
    """The ranks ended with an error; the message carries the end of their log and says how to go on."""


class RunInterrupted(RuntimeError):
    """Ctrl-C or SIGTERM; everything was stopped. The message says how to resume."""


@contextlib.contextmanager
def engines_for(config: Config, model_path: str, log_path: Path) -> Iterator[Config]:
    """`config` with the URLs of running engines in it: the given ones, or rollout.engine.count started here on
    `model_path`, which are watched and started again when they fail."""
    engine = config.rollout.engine
    if engine.urls:
        check_keys(engine)
        yield config
        return
    refuse_code(model_path, trusted=config.model.trust_remote_code)
    if on_gpus_here(config):
        check_engines(config, read_config(model_path))
    draw_key(engine)
    lora, adapters = config.model.lora, None
    if config.rollout.publish == "adapter" and lora.on:
        adapters = lora.rank, sorted(adapted_modules(read_config(model_path), lora))
    processes: list[EngineProcess] = []
    for number in range(engine.count):
        log = log_path if engine.count == 1 else log_path.with_stem(f"{log_path.stem}-{number}")
        processes.append(EngineProcess.from_config(
            config.rollout, model_path, log_path=log, model_dtype=config.model.dtype, seed=config.run.seed,
            weight_version=NOTHING_PUBLISHED, return_routed_experts=config.algo.router_replay == "rollout",
            fp32_lm_head=config.model.fp32_lm_head, taken_ports=[process.port for process in processes], number=number,
            adapters=adapters))
    served = dataclasses.replace(engine, urls=tuple(process.base_url for process in processes))
    if engine.router == "local":
        processes.append(router_process(engine, log_path.with_stem(f"{log_path.stem}-router"),
                                        [process.port for process in processes]))
        served = dataclasses.replace(served, router=processes[-1].base_url)
    with after_start(), Supervisor(processes, engine):
        check_keys(served)
        yield dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=served))


def run_ranks(recipe: str, config: Config) -> None:
    """Starts parallel.world_size ranks of `recipe` (not of rl: programs.py) and waits for them.

    RunFailed or RunInterrupted; no rank is left.

    Their output goes to <run.dir>/trainer.log; progress is shown from the metrics they write.
    """
    run_dir = Path(config.run.dir)
    check_tmpdir()
    check_disk(run_dir)
    launch_config = run_dir / "launch.json"
    write_json(launch_config, to_dict(config))
    log_path = run_dir / "trainer.log"
    command = with_parent([*ranks_command(config), "megatron_rl.train", recipe, str(launch_config)])
    with after_start(), log_path.open("ab") as log, terminable(), scratch_environment() as temporary:
        begin = log.tell()
        ranks = subprocess.Popen(command, env=rank_environment() | loopback_only(config) | temporary,
                                 stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            try:
                follow(ranks, recipe, config)
            finally:
                code = stop_group(ranks)
        except KeyboardInterrupt:  # what is said of the last checkpoint is said when no rank can save any more
            raise RunInterrupted(f"stopped; {how_to_resume(run_dir)}") from None
        check_still_there(run_dir)
        if code:
            words = last_words(log_path, begin)
            raise RunFailed(f"the {recipe} ranks ended with exit code {code}; from {log_path}:\n{words}\n"
                            f"{how_to_go_on(run_dir, words)}")


@contextlib.contextmanager
def scratch_environment() -> Iterator[dict[str, str]]:
    """TMPDIR of what is started inside, removed at the end."""
    folder = make_scratch()
    try:
        yield {"TMPDIR": str(folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_still_there(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise RunFailed(f"run.dir={run_dir} was removed while the run went on, and its checkpoints with it")


@contextlib.contextmanager
def after_start() -> Iterator[None]:
    """What goes wrong once something has been started is a failed run, not wrong input (exit codes: cli.main)."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunFailed(str(error) or type(error).__name__) from error


def ranks_command(config: Config) -> list[str]:
    """The command line that starts the ranks, up to the module that they run: torchrun's, or on CPU forked_ranks'."""
    ranks, port = config.parallel.world_size, choose_port(None)
    if not torch.cuda.is_available():
        return [sys.executable, "-m", "megatron_rl.forked_ranks", str(ranks), str(port)]
    return [sys.executable, "-m", "megatron_rl.compat.loopback_store", "--nnodes=1", f"--nproc-per-node={ranks}",
            "--master-addr=127.0.0.1", f"--master-port={port}", "-m"]


class Running(Protocol):
    """Something that goes on until it has an exit code."""

    def poll(self) -> int | None: ...


def follow(ranks: Running, recipe: str, config: Config, look: Callable[[], None] = lambda: None) -> None:
    """Show progress from the metrics that the run writes, until the ranks end. look: called at every turn."""
    if recipe in ("convert", "replay"):
        while ranks.poll() is None:
            time.sleep(POLL_S)
        return
    total = config.run.steps if recipe == "rl" else config.sft.total_steps
    start = choose(config.run)
    resumed_at = None if start is None else step_of(start)
    run_dir, every = Path(config.run.dir), config.observe.print_samples
    files = [JsonlTail(run_dir / name, resumed_at) for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl")]
    phases = PhaseFile(run_dir)
    phases.remove()  # of an earlier start
    with RunProgress(total, recipe.upper(), config.observe.progress, first_step=resumed_at or 0) as progress:
        running = True
        while running:
            running = ranks.poll() is None and run_dir.is_dir()
            if running:
                look()
            metrics, evaluations, samples = (file.new_rows() for file in files)
            if (phase := phases.read()) is not None:
                progress.phase(*phase)
            for row in evaluations:
                if "accuracy" in row:  # a graded reward has none
                    progress.update(row["step"], {"eval/accuracy": row["accuracy"]})
            for row in metrics:
                progress.update(row["step"], row)
            shown = {row["step"]: row for row in reversed(samples) if every and row["step"] % every == 0}
            for step in sorted(shown):  # the first of each step
                progress.show_sample(shown[step])
            if running:
                time.sleep(POLL_S)


class JsonlTail:
    """The rows that a run writes to a JSONL file after this object was made.

    A run that goes on from the checkpoint of `resumed_at` (None: one that begins) first puts a file without the later
    rows in the place of the old one (observe/jsonl.py: keep_rows): that one is read from its beginning.
    """

    def __init__(self, path: Path, resumed_at: int | None):
        self._path, self._resumed_at = path, resumed_at
        old = path.stat() if path.exists() else None
        self._inode, self._offset = (None, 0) if old is None else (old.st_ino, old.st_size)

    def new_rows(self) -> list[dict]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:  # there is none yet, or run.dir was removed
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            whole_lines, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole_lines + newline)
        rows = [json.loads(line) for line in whole_lines.splitlines()]
        return [row for row in rows if self._resumed_at is None or row["step"] > self._resumed_at]


def rank_environment() -> dict[str, str]:
    """One thread per rank (two ranks share two cores), no compiler, no hub."""
    environment = SAME_IN_RANKS_AND_ENGINES | os.environ
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    environment |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
                    "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if SOURCE_TREE is not None:  # an installed package is found without help
        paths = [str(SOURCE_TREE), str(SOURCE_TREE / "kernels"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def loopback_only(config: Config) -> dict[str, str]:
    """Gloo listens on loopback, unless an engine elsewhere has to reach it (rollout.publish=broadcast)."""
    here = all(is_loopback(urlsplit(url).hostname) for url in config.rollout.engine.urls)
    return {"GLOO_SOCKET_IFNAME": "lo"} if here else {}


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does; SIGINT too where a script started this in the background and it was ignored."""

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_group(process: subprocess.Popen, grace_s: float = STOP_GRACE_S) -> int:
    """Exit code of the leader; SIGTERM, then SIGKILL, for what still runs of its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def check_disk(run_dir: Path) -> None:
    """Create the run's folder; OSError before anything starts when there is no room for checkpoints."""
    run_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run_dir).free
    if free < MIN_FREE_BYTES:
        raise OSError(f"run.dir={run_dir}: {free / 2**20:.0f} MiB free, at least {MIN_FREE_BYTES / 2**20:.0f} MiB "
                      "needed; free some space or choose another run.dir")


def how_to_go_on(run_dir: Path, words: str) -> str:
    """After ranks have failed with these last words: advice that can help."""
    if "damaged checkpoint" in words or "run.resume_from=" in words:
        return "nothing was changed"  # the words say how to go on
    if FAULT_OF_INPUT.search(words):
        return f"the same command would end the same way: mend the cause first. Then {how_to_resume(run_dir)}"
    return how_to_resume(run_dir)


def how_to_resume(run_dir: Path) -> str:
    steps = saved_steps(run_dir / "checkpoints")
    if not steps:
        begun = any((run_dir / name).exists() for name in ("metrics.jsonl", "config.json"))
        return "no checkpoint had been written yet: the same command begins again" + " with resume=true" * begun
    return (f"the last checkpoint is step {steps[-1]} in {run_dir}/checkpoints: "
            "the same command with resume=true goes on")


def last_words(log_path: Path, begin: int) -> str:
    """Why the ranks ended, from what they wrote after byte `begin`.

    If a rank was killed, the text says so: other ranks may have complained about losing it. Otherwise it is the first
    traceback of a rank, from which later ones follow, or the last lines if there is none.
    """
    lines = [RANK_PREFIX.sub("", line) for line in log_path.read_bytes()[begin:].decode(errors="replace").splitlines()]
    if any(KILLED.search(line) for line in lines):
        return ("a rank was killed (SIGKILL), most likely because memory ran out: lower batch.tokens_per_microbatch, "
                "set model.recompute=full, or use a smaller model")
    for start, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            body = lines[start + 1:]
            end = next((i for i, text in enumerate(body) if text and not text.startswith((" ", "\t"))), len(body) - 1)
            if not body[end].startswith("torch.distributed.elastic"):  # torchrun's own, about its ranks
                return "\n".join([*body[max(0, end - LOG_LINES_SHOWN):end], *body[end:end + LOG_LINES_SHOWN]])
    return "\n".join(lines[-LOG_LINES_SHOWN:])
