"""`python -m megatron_rl.orchestrator LAUNCH.json`, as the launcher starts it beside the ranks of the trainer."""

from __future__ import annotations

import signal
import sys

from megatron_rl import signals
from megatron_rl.compat.quick_imports import quick_imports
from megatron_rl.orchestrator.allocator import keep_freed_memory
from megatron_rl.rollout.die_with_parent import die_with_parent, launcher_is_gone, name_process


def main(config_path: str, *, stop_signals: tuple[signal.Signals, ...] = (signal.SIGUSR1,)) -> None:
    name_process("orchestrator")
    keep_freed_memory()
    signals.listen(stop_signals)  # before the slow imports: the signal may come at any time
    with quick_imports():
        from megatron_rl.config.load import from_json
        from megatron_rl.orchestrator.main import run

    run(from_json(config_path))


if __name__ == "__main__":
    die_with_parent()  # it does not outlive its launcher, whatever ends that
    if launcher_is_gone():
        sys.exit("the launcher is gone")
    main(*sys.argv[1:])
