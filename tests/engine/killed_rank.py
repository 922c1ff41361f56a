"""One rank of torchrun that kills itself at a set moment: `python -m tests.engine.killed_rank CONFIG.json KILL.json`.

Apart from that it is a rank of `megatron-rl rl`. KILL.json holds a kills.Kill; without a phase nothing is killed, and
the seconds that each phase took are written to phases.json in the run's folder.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from megatron_rl.config.load import from_json
from megatron_rl.model.checkpoint import Checkpoints
from megatron_rl.recipes import rl
from megatron_rl.recipes.parts import BroadcastRollouts
from megatron_rl.recipes.weights import PublishedWeights
from megatron_rl.reward import RewardPool
from megatron_rl.rollout.die_with_parent import die_with_parent
from megatron_rl.train_step.step import TrainStep
from tests.engine.kills import Kill


class Killer:
    """Watches the phases go by; `seconds` collects how long each took."""

    def __init__(self, kill: Kill, rank: int, report: Path):
        self._kill, self._rank, self._report = kill, rank, report
        self._step, self._inside = 0, []
        self.seconds: dict[str, list[float]] = {}

    def entered(self, phase: str) -> float:
        self._inside.append(phase)
        kill = self._kill
        if (phase, self._step, self._rank) == (kill.phase, kill.step, kill.rank):
            self._kill = Kill()
            if kill.delay_s == 0.0:
                self._die(kill)
            threading.Timer(kill.delay_s, self._die, [kill]).start()
        return time.perf_counter()

    def left(self, phase: str, since: float) -> None:
        self._inside.remove(phase)
        self.seconds.setdefault(phase, []).append(time.perf_counter() - since)

    def _die(self, kill: Kill) -> None:
        self._report.write_text(json.dumps({"step": self._step, "inside": self._inside}))
        if kill.everything:
            os.kill(os.getppid(), signal.SIGKILL)  # torchrun: the kernel then kills all its ranks
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: type, method: str, phase: str) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def plain(*arguments, **options):
            if phase == "rollout":
                self._step = inspect.signature(original).bind(*arguments, **options).arguments["step"]
            since = self.entered(phase)
            try:
                return original(*arguments, **options)
            finally:
                self.left(phase, since)

        @functools.wraps(original)
        async def awaited(*arguments, **options):
            since = self.entered(phase)
            try:
                return await original(*arguments, **options)
            finally:
                self.left(phase, since)

        setattr(owner, method, awaited if inspect.iscoroutinefunction(original) else plain)


def main(config_path: str, kill_path: str) -> None:
    from megatron.core.optimizer import ChainedOptimizer

    die_with_parent()
    config = from_json(config_path)
    kill = Kill(**json.loads(Path(kill_path).read_text()))
    killer = Killer(kill, int(os.environ["RANK"]), Path(config.run.dir) / "killed.json")
    for owner, method, phase in ((BroadcastRollouts, "collect", "rollout"), (RewardPool, "score", "reward"),
                                 (TrainStep, "count_routing", "logprobs"), (TrainStep, "backward", "forward_backward"),
                                 (ChainedOptimizer, "step", "optimiser"), (PublishedWeights, "publish", "publish"),
                                 (Checkpoints, "_write", "save")):
        killer.watch(owner, method, phase)
    rl.run(config)
    if kill.phase is None and os.environ["RANK"] == "0":
        (Path(config.run.dir) / "phases.json").write_text(json.dumps(killer.seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
