"""Kill a run at random moments of every phase, resume it each time, and compare what it becomes with a run left alone.

`python -m tests.engine.kills [--chains N] [--seed S]` (make test-kills) prints one line for each kill. A chain is one
run that is killed once in each phase, in random order, and goes on from its newest checkpoint after each; ranks are
torchrun's, the engine is real. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.load import load, to_dict
from megatron_rl.config.schema import Config
from megatron_rl.launch import local
from megatron_rl.model.checkpoint_files import read_manifest, saved_steps, step_name
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.rollout.engine_command import draw_key
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.ports import choose_port

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("rollout", "reward", "logprobs", "forward_backward", "optimiser", "publish", "save")
STEPS, SAVE_EVERY = 8, 2
SETTINGS = [
    "experiment=quickstart", f"run.steps={STEPS}", f"run.save_every_steps={SAVE_EVERY}", "run.keep_checkpoints=99",
    "eval.every_steps=4", "eval.problems=2", "rollout.prompts_per_step=2", "rollout.responses_per_prompt=4",
    "rollout.max_response_tokens=12", "rollout.max_context_tokens=64", "c3po.phi=40", "c3po.updates_per_rollout=2",
    "reward.routes.math=tests.rewards.brevity", "observe.wandb=off", "rollout.engine.deterministic=true",
    "rollout.engine.start_timeout_s=900",
]
TIMEOUT_S = 800.0
LOG = "ranks.log"
CLOCKED = ("time", "tokens_per_s", "seconds", "flops", "rollout/engine_queue")  # beginnings of metrics' names
WORKING_FILES = ("random.pt",)  # Python's own generator is drawn from by libraries, as often as they retry


@dataclass(frozen=True)
class Kill:
    """SIGKILL for `rank` (everything: and torchrun, hence all ranks) delay_s after it enters `phase` of `step`."""

    phase: str | None = None
    step: int = 0
    rank: int = 0
    delay_s: float = 0.0
    everything: bool = False


def run_ranks(config: Config, kill: Kill) -> int:
    """torchrun the configuration until it ends or `kill` ends it; the exit code. Output goes to <run.dir>/ranks.log."""
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    config_path, kill_path = run_dir / "ranks.json", run_dir / "kill.json"
    config_path.write_text(json.dumps(to_dict(config)))
    kill_path.write_text(json.dumps(dataclasses.asdict(kill)))
    (run_dir / "killed.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1",
               f"--nproc-per-node={config.parallel.world_size}", "--master-addr=127.0.0.1",
               f"--master-port={choose_port(None)}", "-m", "tests.engine.killed_rank", str(config_path), str(kill_path)]
    with (run_dir / LOG).open("wb") as log:  # no pipe: torch_shm_manager outlives the ranks and would hold it open
        return subprocess.run(command, cwd=ROOT, env=local.rank_environment(), stdout=log, stderr=log,
                              timeout=TIMEOUT_S, check=False).returncode


def last_words(config: Config) -> str:
    return local.last_words(Path(config.run.dir) / LOG, 0)


def with_run(config: Config, **run) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **run))


def was_killed(config: Config) -> dict | None:
    """Where the kill struck: {"step", "inside": phases}; None if it did not."""
    path = Path(config.run.dir) / "killed.json"
    return json.loads(path.read_text()) if path.exists() else None


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two run folders: weights, moments and loop state of checkpoints, metrics, the export."""
    found = []
    steps = [saved_steps(run_dir / "checkpoints") for run_dir in (one, other)]
    if steps[0] != steps[1]:
        found.append(f"checkpoints {steps[0]} and {steps[1]}")
    for step in set(steps[0]) & set(steps[1]):
        left, right = (read_manifest(run_dir / "checkpoints" / step_name(step)) for run_dir in (one, other))
        found += [f"{name} of step {step}" for name in left["files"]
                  if name not in WORKING_FILES and left["files"][name] != right["files"].get(name)]
        found += [f"optimiser steps of step {step}"] * (left["optimizer_steps"] != right["optimizer_steps"])
    for name in ("metrics.jsonl", "eval.jsonl"):
        if timeless_rows(one / name) != timeless_rows(other / name):
            found.append(name)
    weights = [(run_dir / "hf" / "model.safetensors").read_bytes() for run_dir in (one, other)]
    return found + ["hf/model.safetensors"] * (weights[0] != weights[1])


def timeless_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file without what depends on the clock."""
    return [timeless(json.loads(line)) for line in path.read_text().splitlines()]


def timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith(CLOCKED)}


class Engine:
    """A server that outlives the runs, and is started again should a kill have taken it along."""

    def __init__(self, config: Config, folder: Path):
        self._config, self._folder, self._process = config, folder, None

    def url(self) -> str:
        if self._process is None or not self._process.alive:
            self.close()
            draw_key(self._config.rollout.engine)
            self._process = EngineProcess.from_config(self._config.rollout, self._config.model.path,
                                                      log_path=self._folder / "engine.log")
            self._process.start()
            self._process.wait_until_healthy()
        return self._process.base_url

    def close(self) -> None:
        if self._process is not None:
            self._process.stop()


def chain(config: Config, engine: Engine, phases: Sequence[str], seconds: Mapping[str, Sequence[float]],
          rng: random.Random) -> list[list[str]]:
    """Kill and resume one run in each of `phases`, then let it end. A row (phase, kill, resumed from) for each kill."""
    rows, first = [], 0
    for phase in phases:
        step = min(STEPS - 1, first + rng.randrange(3))
        if phase == "save":  # the step after which the next checkpoint is written
            step = first + SAVE_EVERY - 1
        kill = Kill(phase, step, rank=0 if phase == "reward" else rng.randrange(2),
                    delay_s=rng.random() * statistics.median(seconds[phase]), everything=rng.random() < 0.5)
        run_ranks(with_url(with_run(config, resume=True), engine.url()), kill)
        struck = was_killed(config)
        if struck is None:
            raise RuntimeError(f"{kill} did not strike:\n{last_words(config)}")
        first = max(saved_steps(Path(config.run.dir) / "checkpoints"), default=0)
        whom = "torchrun and all ranks" if kill.everything else f"rank {kill.rank}"
        where = "+".join(struck["inside"]) or "just after"
        rows.append([phase, f"step {step}, {kill.delay_s * 1000:.0f} ms in ({where}), {whom}",
                     f"step {first}" if first else "the start"])
    if run_ranks(with_url(with_run(config, resume=True), engine.url()), Kill()):
        raise RuntimeError(f"the resumed run failed:\n{last_words(config)}")
    return rows


def with_url(config: Config, url: str) -> Config:
    engine = dataclasses.replace(config.rollout.engine, urls=(url,))
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=engine))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=3, help=f"runs, each killed {len(PHASES)} times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs go, and stay (default: a temporary folder)")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    failed = False
    with tempfile.TemporaryDirectory(prefix="kills_") as scratch:
        folder = options.folder or Path(scratch)
        make_random_model(folder / "init", seed=0, num_hidden_layers=2)
        config = load([*SETTINGS, f"model.path={folder / 'init'}", f"run.dir={folder / 'alone'}"])
        engine = Engine(config, folder)
        try:
            if run_ranks(with_url(config, engine.url()), Kill()):
                raise RuntimeError(f"the run left alone failed:\n{last_words(config)}")
            seconds = json.loads((folder / "alone" / "phases.json").read_text())
            print(f"{'phase':18}{'kill':70}{'resumed from':14}equal", flush=True)
            for number in range(options.chains):
                in_background = number % 2 == 0
                killed = with_run(config, dir=str(folder / f"chain{number}"), async_save=in_background)
                rows = chain(killed, engine, rng.sample(PHASES, len(PHASES)), seconds, rng)
                differing = differences(folder / "alone", folder / f"chain{number}")
                failed |= bool(differing)
                for phase, kill, start in rows:
                    print(f"{phase:18}{kill:70}{start:14}{'no' if differing else 'yes'}", flush=True)
                print(f"  run {number}, {'background' if in_background else 'waiting'} saves: "
                      f"{'; '.join(differing) or 'every checkpoint, metric and weight equal bit for bit'}", flush=True)
        finally:
            engine.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
