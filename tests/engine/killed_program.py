"""One process of a run that kills itself at a set moment: `python -m tests.engine.killed_program PROGRAM CONFIG.json`.

PROGRAM is `rank` or `orchestrator`; apart from its death it is what `megatron-rl rl` starts. It reads and
writes in the run's folder:

    kills.json             a list of kills.Kill; the first for PROGRAM that has not struck yet is carried out
    killed-N.json          the phases in which kill N struck
    pids-PROGRAM-RANK.txt  the process id of every start
    phases-PROGRAM.json    the seconds of each phase, if there is no kill
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_rl.config.load import from_json
from megatron_rl.rollout.die_with_parent import die_with_parent
from tests.engine.kills import Kill, note_pid


class Killer:
    """Watches the phases go by; `seconds` collects how long each took. number: of `kill` in kills.json."""

    def __init__(self, kill: Kill | None, number: int, rank: int, run_dir: Path):
        self._kill, self._rank = kill, rank
        self._report = run_dir / f"killed-{number}.json"
        self.step, self._inside, self._entries = 0, [], 0
        self.seconds: dict[str, list[float]] = {}

    def entered(self, phase: str, step: int) -> float:
        self._inside.append(phase)
        kill = self._kill
        if kill is not None and (phase, step, self._rank) == (kill.phase, kill.step, kill.rank):
            self._entries += 1
            if self._entries < kill.entry:
                return time.perf_counter()
            self._kill = None
            if kill.delay_s == 0.0:
                self._die(kill)
            threading.Timer(kill.delay_s, self._die, [kill]).start()
        return time.perf_counter()

    def left(self, phase: str, since: float) -> None:
        self._inside.remove(phase)
        self.seconds.setdefault(phase, []).append(time.perf_counter() - since)

    def _die(self, kill: Kill) -> None:
        self._report.write_text(json.dumps({"step": self.step, "inside": self._inside}))
        if kill.everything:
            os.kill(os.getppid(), signal.SIGKILL)  # the kernel then kills all its ranks
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: type, method: str, phase: str,
              step_of: Callable[[dict[str, Any]], int] | None = None, *, background: bool = False) -> None:
        """Calls of owner.method are `phase`. step_of: which step of the loop it is, from the arguments by name.

        background: in a thread of its own, while the loop may be in a later step.
        """
        original = getattr(owner, method)

        def begin(arguments: tuple, options: dict) -> float:
            step = self.step
            if step_of is not None:
                step = step_of(inspect.signature(original).bind(*arguments, **options).arguments)
            if not background:
                self.step = step
            return self.entered(phase, step)

        @functools.wraps(original)
        def plain(*arguments, **options):
            since = begin(arguments, options)
            try:
                return original(*arguments, **options)
            finally:
                self.left(phase, since)

        @functools.wraps(original)
        async def awaited(*arguments, **options):
            since = begin(arguments, options)
            try:
                return await original(*arguments, **options)
            finally:
                self.left(phase, since)

        setattr(owner, method, awaited if inspect.iscoroutinefunction(original) else plain)


def rank(killer: Killer) -> Callable[..., None]:
    from megatron_rl.model.checkpoint import Checkpoints
    from megatron_rl.model.checkpoint_files import step_of
    from megatron_rl.train_step.step import TrainStep
    from megatron_rl.trainer import main
    from megatron_rl.trainer.client import Link

    killer.watch(Link, "next", "waiting")
    killer.watch(main.Trainer, "_train", "train", lambda given: given["step"])
    killer.watch(TrainStep, "count_routing", "logprobs")
    killer.watch(TrainStep, "backward", "forward_backward")
    killer.watch(TrainStep, "apply", "optimiser")
    killer.watch(main.Trainer, "_publish", "publish", lambda given: given["version"] - 1)
    killer.watch(Checkpoints, "_write", "save", lambda given: step_of(given["partial"].with_suffix("")) - 1,
                 background=True)
    return main.run


def keep_finish_back(run_dir: Path, numbers: Sequence[int]) -> None:
    """Ranks report that they have finished only after these kills have struck the orchestrator.

    Otherwise a quick export could be over before the kill. The ranks would end, and nobody would start the orchestrator
    again.
    """
    from megatron_rl.trainer import main

    finish = main.Trainer._finish

    def kept_back(trainer, **arguments):
        commands = int((run_dir / "pids-orchestrator-0.txt").read_text().split()[-1])
        due = not all((run_dir / f"killed-{number}.json").exists() for number in numbers)
        outcome = finish(trainer, **arguments)
        while due and lives(commands):
            time.sleep(0.01)
        return outcome

    main.Trainer._finish = kept_back


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def orchestrator(killer: Killer) -> Callable[..., None]:
    from megatron_rl.orchestrator import main
    from megatron_rl.orchestrator.evaluation import Evaluator
    from megatron_rl.orchestrator.ranks import Ranks
    from megatron_rl.orchestrator.rollouts import Rollouts
    from megatron_rl.orchestrator.state import OfferedStep
    from megatron_rl.orchestrator.weights import PublishedWeights
    from megatron_rl.reward import RewardPool
    from megatron_rl.rollout.fleet import Fleet

    killer.watch(Rollouts, "offer", "offer", lambda given: given["step"])
    killer.watch(Fleet, "generate", "sampling")
    killer.watch(RewardPool, "score", "judging")
    killer.watch(OfferedStep, "write", "handing over")
    killer.watch(Ranks, "train", "training")
    killer.watch(PublishedWeights, "publish", "publishing")
    killer.watch(Evaluator, "evaluate", "evaluating")
    killer.watch(Ranks, "save", "saving")
    killer.watch(Ranks, "finish", "finishing")
    return main.run


def main(program: str, config_path: str) -> None:
    die_with_parent()
    config = from_json(config_path)
    run_dir = Path(config.run.dir)
    kills = [Kill(**each) for each in json.loads((run_dir / "kills.json").read_text())]
    left = [number for number, kill in enumerate(kills)
            if kill.program == program and not (run_dir / f"killed-{number}.json").exists()]
    number = left[0] if left else -1
    mine = int(os.environ.get("RANK", "0"))
    note_pid(run_dir, program, mine)
    killer = Killer(kills[number] if left else None, number, mine, run_dir)
    run = {"rank": rank, "orchestrator": orchestrator}[program](killer)
    if program == "rank":
        keep_finish_back(run_dir, [number for number, kill in enumerate(kills) if kill.phase == "finishing"])
    run(config)
    if not kills and mine == 0:
        (run_dir / f"phases-{program}.json").write_text(json.dumps(killer.seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
