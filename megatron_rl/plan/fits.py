"""Whether what the ranks of one machine hold all along fits into its memory; asked before they build anything."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from megatron_rl.config.schema import Config, SFTConfig
from megatron_rl.model.network import Network
from megatron_rl.plan.memory import plan_memory


def check_fits(model: Network, config: Config, *, ranks: int, which: str, machine: str) -> str | None:
    """ValueError if what `ranks` ranks hold all along exceeds the memory of this machine, or of one GPU.

    That part of the plan is exact. If only the peak exceeds it, which is an estimate, the text comes back as a warning.
    which, machine: what the ranks and the machine are called in the text.
    """
    plan = plan_memory(model, replace(config, sft=SFTConfig()))  # RL starts here, whatever section sft says
    memory = psutil.virtual_memory().total
    if torch.cuda.is_available():
        if ranks * plan.host > memory:
            raise ValueError(f"optimizer.offload: the optimiser's states of {which} take {ranks * plan.host / 1e9:.1f} "
                             f"GB of {machine}'s own memory, which has {memory / 1e9:.1f} GB; set "
                             "optimizer.offload=false, or train on more machines")
        whose, ranks, have = f"one GPU of {machine}", 1, torch.cuda.get_device_properties(0).total_memory
    else:
        whose, have = machine, memory
        plan = replace(plan, optimizer=plan.optimizer + plan.host)  # there the host's memory is the device's
    stays, peak = ranks * plan.stays, ranks * plan.total
    text = (f"weights, gradients and optimiser of {which} take {stays / 1e9:.1f} GB, at their peak {peak / 1e9:.1f} "
            f"GB, and {whose} has {have / 1e9:.1f} GB; `megatron-rl plan` with the same overrides shows what takes it "
            "and which layouts take less")
    if stays > have:
        raise ValueError(text)
    return text if peak > have else None
