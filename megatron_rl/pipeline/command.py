"""`megatron-rl pipeline experiment=... [key=value | STAGE.key=value ...]`."""

from __future__ import annotations

import time

from rich.console import Console

from megatron_rl.observe.progress import duration
from megatron_rl.pipeline.check import check, table
from megatron_rl.pipeline.driver import run as run_plan
from megatron_rl.pipeline.plan import plan


def run(options) -> int:
    """Run what is not finished; with --check validate every stage, start nothing."""
    console, started = Console(), time.perf_counter()
    todo = plan(options.overrides)
    check(todo)
    console.print(table(todo))
    if options.check:
        console.print("every stage is valid")
        return 0
    report = run_plan(todo, console)
    console.print(f"report: [bold]{report}[/bold]  (this start took {duration(time.perf_counter() - started)})")
    return 0
