"""What a user sees of each program, played into a terminal: `python -m tests.terminal_scenes SCENE` in a folder that
holds a model. The program prints its own tables and lines; the clock and the metrics of the steps are set here."""

import sys
import time

from rich.console import Console

from megatron_rl.cli import main
from megatron_rl.observe.progress import RunProgress
from megatron_rl.recipes.quickstart import result_table

RL_METRICS = {"reward/mean": 0.6484, "eval/accuracy": 0.594, "budget/fill": 1.0, "tokens_per_s/rollout": 12345.6,
              "tokens_per_s/train": 9876.5, "time/generate": 8.0, "time/train": 4.0, "time/publish": 1.0,
              "time/step": 13.1}
SFT_METRICS = {"train/loss": 0.4321, "tokens_per_s/train": 9876.5, "time/train": 1.0, "time/step": 1.2}


def play(title: str, total: int, metrics: dict[str, float], phases: list[tuple[str, float]]) -> None:
    """The line before the first step, in the middle of the run in each phase, and what stays at its end."""
    now = [0.0]
    time.monotonic = lambda: now[0]
    console = Console(file=sys.stderr, get_time=lambda: 0.0)
    progress = RunProgress(total, title, False, console=console)
    for step, (phase, seconds) in [(0, ("load", 5.0)), *((6, each) for each in phases)]:
        now[0] = 20.0 + 13.0 * step
        if step:
            progress.update(step, metrics)
        progress.phase(phase, seconds)
        console.print(progress)
    now[0] = 0.0
    with RunProgress(total, title, True, console=console) as progress:
        now[0] = 20.0 + 13.0 * total
        progress.update(total, metrics)


def rl() -> None:
    main(["rl", "--check", "experiment=quickstart", "model.path=model"])
    play("RL", 60, RL_METRICS, [("generate", 5.0), ("train", 2.5), ("publish", 0.5), ("evaluate", 75.0)])


def sft() -> None:
    main(["sft", "--check", "experiment=quickstart_sft", "model.path=model"])
    play("SFT", 240, SFT_METRICS, [("train", 0.4), ("save", 3.0)])


def pipeline() -> None:
    main(["pipeline", "--check", "experiment=ring_lite_tiny"])


def quickstart() -> None:
    rows = {"before_sft": (0.0, 0.0, 0.0, 0.0, 71.25), "after_sft": (0.594, 0.547, 0.641, 0.12, 20.5),
            "after_rl": (0.912, 0.883, 0.939, 0.03, 22.75)}
    Console().print(result_table({label: dict(zip(
        ("accuracy", "low", "high", "direct_share", "mean_response_tokens"), row, strict=True))
        for label, row in rows.items()}))
    play("RL", 60, RL_METRICS, [("generate", 5.0)])


SCENES = {scene.__name__: scene for scene in (rl, sft, pipeline, quickstart)}

if __name__ == "__main__":
    SCENES[sys.argv[1]]()
