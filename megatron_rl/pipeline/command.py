"""`megatron-rl pipeline experiment=... [key=value | STAGE.key=value ...]`."""

from __future__ import annotations

import time

from rich.console import Console

from megatron_rl.observe.progress import duration
from megatron_rl.observe.say import say
from megatron_rl.pipeline.check import branches, check, check_start, table
from megatron_rl.pipeline.driver import run as run_plan
from megatron_rl.pipeline.plan import plan


def run(options) -> int:
    """Run what is not finished; with --check validate every stage, start nothing."""
    console, started = Console(), time.perf_counter()
    todo = plan(options.overrides)
    base_is_here = (todo.stages[0].model / "config.json").is_file()
    if options.check and base_is_here:
        check_start(todo, range(len(todo.stages)))
    else:
        check(todo)
    console.print(table(todo))
    for line in branches(todo):
        console.print(line)
    if options.check:
        unseen = "" if base_is_here else f" (no data was looked at: {todo.stages[0].model} is not here)"
        say(f"valid: all {len(todo.stages)} stages of {todo.whole.run.name}{unseen}")
        return 0
    report = run_plan(todo, console)
    console.print(f"report: [bold]{report}[/bold]  (this start took {duration(time.perf_counter() - started)})")
    return 0
