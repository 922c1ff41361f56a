"""Kill a run at random moments of every phase, and compare what it becomes with a run left alone.

`python -m tests.engine.kills [--chains N] [--seed S]` (make test-kills) prints one line for each kill; the engine is
real. Two tables. A rank that is killed ends the run: a chain is one run that is killed once in each phase, in random
order, and goes on from its newest checkpoint after each. An orchestrator that is killed is started again while the
ranks wait: one run survives a kill in each phase, and its ranks keep their process ids. Exit code 1 when anything
differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.load import load
from megatron_rl.config.schema import Config
from megatron_rl.launch.local import RunFailed
from megatron_rl.launch.programs import Programs, run_rl
from megatron_rl.model.checkpoint_files import read_manifest, saved_steps, step_name
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.rollout.engine_command import draw_key
from megatron_rl.rollout.engines import EngineProcess

PHASES = ("waiting", "logprobs", "forward_backward", "optimiser", "publish", "save")
ORCHESTRATOR_PHASES = ("sampling", "judging", "handing over", "training", "publishing", "evaluating", "saving",
                       "finishing")
STEPS, SAVE_EVERY, EVALUATE_EVERY = 8, 2, 4
SETTINGS = [
    "experiment=quickstart", f"run.steps={STEPS}", f"run.save_every_steps={SAVE_EVERY}", "run.keep_checkpoints=99",
    f"eval.every_steps={EVALUATE_EVERY}", "eval.problems=2",
    "rollout.prompts_per_step=2", "rollout.responses_per_prompt=4",
    "rollout.max_response_tokens=12", "rollout.max_context_tokens=64", "algo.phi=40", "algo.updates_per_rollout=2",
    "reward.routes.math=tests.rewards.brevity", "observe.wandb=off", "rollout.engine.deterministic=true",
    "rollout.engine.start_timeout_s=900", "observe.progress=false", "orchestrator.max_restarts=99",
]
CLOCKED = ("time", "tokens_per_s", "seconds", "flops", "rollout/engine_queue")  # beginnings of metrics' names
WORKING_FILES = ("random.pt",)  # Python's own generator is drawn from by libraries, as often as they retry


@dataclass(frozen=True)
class Kill:
    """SIGKILL delay_s after `rank` of the trainer, or the orchestrator, enters `phase` of `step`.

    entry: the first time it enters it, the second, and so on; a step has many requests.
    everything: for the process that started the ranks too, and hence for all of them.
    """

    phase: str
    step: int
    rank: int = 0
    delay_s: float = 0.0
    everything: bool = False
    program: str = "rank"
    entry: int = 1


def run_programs(config: Config, *kills: Kill) -> str:
    """Both programs to the end of the run, or until a kill ends it; "", or why it failed."""
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for path in (*run_dir.glob("killed-*.json"), *run_dir.glob("pids-*.txt")):
        path.unlink()
    (run_dir / "kills.json").write_text(json.dumps([dataclasses.asdict(kill) for kill in kills]))
    module = "tests.engine.killed_program"
    try:
        run_rl(config, Programs((module, "orchestrator"), (module, "rank")))
    except RunFailed as failed:
        return str(failed)
    return ""


def with_run(config: Config, **run) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **run))


def was_killed(config: Config, number: int = 0) -> dict | None:
    """Where the kill of this number struck: {"step", "inside": phases}; None if it did not."""
    path = Path(config.run.dir) / f"killed-{number}.json"
    return json.loads(path.read_text()) if path.exists() else None


def note_pid(run_dir: Path, program: str, number: int) -> None:
    """By the program itself, at its start. number: which rank."""
    with (run_dir / f"pids-{program}-{number}.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")


def starts(config: Config, program: str) -> list[int]:
    """How often each process of `program` was started in the last call of run_programs, by rank."""
    return [len(set(path.read_text().split())) for path in sorted(Path(config.run.dir).glob(f"pids-{program}-*.txt"))]


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
        kill = Kill(phase, step, rank=rng.randrange(2), delay_s=rng.random() * statistics.median(seconds[phase]),
                    everything=rng.random() < 0.5)
        said = run_programs(with_url(with_run(config, resume=True), engine.url()), kill)
        struck = was_killed(config)
        if struck is None:
            raise RuntimeError(f"{kill} did not strike: {said}")
        first = max(saved_steps(Path(config.run.dir) / "checkpoints"), default=0)
        whom = "all ranks" if kill.everything else f"rank {kill.rank}"
        where = "+".join(struck["inside"]) or "just after"
        rows.append([phase, f"step {step}, {kill.delay_s * 1000:.0f} ms in ({where}), {whom}",
                     f"step {first}" if first else "the start"])
    if said := run_programs(with_url(with_run(config, resume=True), engine.url())):
        raise RuntimeError(f"the resumed run failed: {said}")
    return rows


def orchestrator_kills(phases: Sequence[str], seconds: Mapping[str, Sequence[float]], rng: random.Random) -> list[Kill]:
    """One kill in each of `phases`, in the order in which a run comes by them."""
    kills = []
    for phase in phases:
        every = {"evaluating": EVALUATE_EVERY, "saving": SAVE_EVERY, "finishing": STEPS}.get(phase, 1)
        step = every * rng.randrange(1, STEPS // every + 1) - 1
        kills.append(Kill(phase, step, delay_s=rng.random() * min(seconds[phase]), program="orchestrator"))
    return sorted(kills, key=lambda kill: (kill.step, ORCHESTRATOR_PHASES.index(kill.phase)))


def survive(config: Config, engine: Engine, kills: Sequence[Kill]) -> list[list[str]]:
    """One run whose orchestrator is killed so often, and whose ranks are not started again. A row (phase, kill, started
    again) for each kill."""
    if said := run_programs(with_url(config, engine.url()), *kills):
        raise RuntimeError(f"the run did not survive: {said}")
    if starts(config, "rank") != [1] * config.parallel.world_size:
        raise RuntimeError(f"ranks were started again: {starts(config, 'rank')}")
    if starts(config, "orchestrator") != [1 + len(kills)]:
        raise RuntimeError(f"{len(kills)} kills; the orchestrator was started {starts(config, 'orchestrator')} times")
    rows = []
    for number, kill in enumerate(kills):
        struck = was_killed(config, number)
        if struck is None:
            raise RuntimeError(f"{kill} did not strike")
        where = "+".join(sorted(set(struck["inside"]))) or "just after"
        rows.append([kill.phase, f"step {kill.step}, {kill.delay_s * 1000:.0f} ms in ({where}), orchestrator",
                     "at once"])
    return rows


def with_url(config: Config, url: str) -> Config:
    engine = dataclasses.replace(config.rollout.engine, urls=(url,))
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=engine))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=3, help="runs of each table, each killed once in every phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("rank", "orchestrator"), help="one of the two tables")
    parser.add_argument("--folder", type=Path, help="where the runs go, and stay (default: a temporary folder)")
    options = parser.parse_args()
    rng, began = random.Random(options.seed), time.monotonic()
    failed, struck, inside = False, Counter(), Counter()
    with tempfile.TemporaryDirectory(prefix="kills_") as scratch:
        folder = options.folder or Path(scratch)
        make_random_model(folder / "init", seed=0, num_hidden_layers=2)
        config = load([*SETTINGS, f"model.path={folder / 'init'}", f"run.dir={folder / 'alone'}"])
        engine = Engine(config, folder)
        try:
            if said := run_programs(with_url(config, engine.url())):
                raise RuntimeError(f"the run left alone failed: {said}")
            seconds = {program: json.loads((folder / "alone" / f"phases-{program}.json").read_text())
                       for program in ("rank", "orchestrator")}
            print(f"{'phase':18}{'kill':70}{'resumed from':14}equal", flush=True)
            for program in [options.only] if options.only else seconds:
                for number in range(options.chains):
                    in_background = number % 2 == 0
                    killed = with_run(config, dir=str(folder / f"{program}{number}"), async_save=in_background)
                    if program == "rank":
                        rows = chain(killed, engine, rng.sample(PHASES, len(PHASES)), seconds[program], rng)
                    else:
                        rows = survive(killed, engine, orchestrator_kills(ORCHESTRATOR_PHASES, seconds[program], rng))
                    differing = differences(folder / "alone", folder / f"{program}{number}")
                    failed |= bool(differing)
                    for phase, kill, start in rows:
                        struck[program, phase] += 1
                        inside[program, phase] += phase in re.search(r"\((.*?)\)", kill)[1].split("+")
                        print(f"{phase:18}{kill:70}{start:14}{'no' if differing else 'yes'}", flush=True)
                    print(f"  {program} {number}, {'background' if in_background else 'waiting'} saves: "
                          f"{'; '.join(differing) or 'every checkpoint, metric and weight equal bit for bit'}",
                          flush=True)
        finally:
            engine.close()
    print("\n| killed | in | times | struck inside it |\n| --- | --- | --- | --- |")
    for (program, phase), times in struck.items():
        print(f"| {program} | {phase} | {times} | {inside[program, phase]} |")
    print(f"{'Some runs differ' if failed else 'All runs ended alike'}; {time.monotonic() - began:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
