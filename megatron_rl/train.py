"""What each rank of torchrun runs: `python -m megatron_rl.train RECIPE CONFIG.json`.

The launcher has composed and checked the configuration; here it is only read.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
RECIPES = ("rl", "sft", "convert")


def main() -> None:
    recipe, config_path = sys.argv[1:]
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} must be one of {', '.join(RECIPES)}")
    _die_with_parent()
    from megatron_rl.config.load import from_json
    from megatron_rl.recipes import convert, rl, sft

    {"rl": rl, "sft": sft, "convert": convert}[recipe].run(from_json(config_path))


def _die_with_parent() -> None:
    """No rank outlives its torchrun, whatever ends it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit("the launcher is gone")


if __name__ == "__main__":
    main()
