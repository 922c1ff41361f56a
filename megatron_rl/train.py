"""What each rank runs: `python -m megatron_rl.train RECIPE CONFIG.json`.

The launcher has composed and checked the configuration; here it is only read.
"""

from __future__ import annotations

import os
import signal
import sys
from types import ModuleType

from megatron_rl.compat.quick_imports import quick_imports
from megatron_rl.rollout.die_with_parent import die_with_parent, launcher_is_gone, name_process
from megatron_rl.signals import ignore

RECIPES = ("rl", "sft", "convert", "replay")


def main() -> None:
    recipe, config_path = sys.argv[1:]
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} must be one of {', '.join(RECIPES)}")
    die_with_parent()  # no rank outlives the process that started it, whatever ends it
    if launcher_is_gone():
        sys.exit("the launcher is gone")
    name_process(f"rank{os.environ.get('RANK', '0')}")
    ignore([signal.SIGUSR1])  # a request to stop is the orchestrator's business; it may come at any time
    with quick_imports():
        recipes = import_recipes()
        from megatron_rl.config.load import from_json

    recipes[recipe].run(from_json(config_path))


def import_recipes() -> dict[str, ModuleType]:
    """The modules of RECIPES by name. Their imports take seconds."""
    from megatron_rl.recipes import convert, replay, sft
    from megatron_rl.trainer import main as rl

    return {"rl": rl, "sft": sft, "convert": convert, "replay": replay}


if __name__ == "__main__":
    main()
