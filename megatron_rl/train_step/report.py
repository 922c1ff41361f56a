"""Combines what the ranks report of one optimiser step: one number per metric, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from c3po import Max, SumCount

TOTALS = ("loss", "selected_tokens")
"""Sums that are reported whole, not divided by a count."""
ROUTER_SUMS = ("balance_loss", "z_loss", "replay_differing", "replay_choices")


@dataclass(frozen=True)
class RankReport:
    """What one rank reports of a step. sums and router (ROUTER_SUMS) are already reduced over the ranks of its stage.

    loads: by layer number, tokens of the fullest expert over the mean. entropies: mean entropy of the router, in nats.
    """

    stage: int
    sums: dict[str, tuple[float, float]]
    maxima: dict[str, float]
    router: list[float]
    loads: dict[int, float]
    entropies: dict[int, float]


def stacked(numbers: Sequence[torch.Tensor | float], device: torch.device | None) -> torch.Tensor:
    """float64 [n] on the device, of 0-dim tensors or numbers, without a read by the host."""
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])


def read_together(*groups: Sequence[torch.Tensor | float]) -> list[list[float]]:
    """The numbers of all groups, each of 0-dim tensors or numbers. The host waits for the device once."""
    numbers = [number for group in groups for number in group]
    device = next((number.device for number in numbers if isinstance(number, torch.Tensor)), None)
    read = iter(stacked(numbers, device).tolist())
    return [list(islice(read, len(group))) for group in groups]


def merge_reports(reports: Sequence[RankReport], num_moe_layers: int) -> tuple[dict[str, SumCount], dict[str, float]]:
    """Sums and layers come from one report per pipeline stage, maxima from all ranks; names as in docs/metrics.md.

    num_moe_layers: the layers whose router losses were measured; 0 leaves these losses out.
    """
    stages = {report.stage: report for report in reversed(reports)}.values()
    sums, gauges, maxima = {}, {}, {}
    for key, (total, count) in (item for stage in stages for item in stage.sums.items()):
        if key in TOTALS:
            gauges[metric_name(key)] = total
        else:
            sums[metric_name(key)] = SumCount(total, count)
    for report in reports:
        for key, value in report.maxima.items():
            maxima[key] = maxima.get(key, Max(value)).merge(Max(value))
    gauges |= {metric_name(key): largest.value for key, largest in maxima.items()}
    balance, z_loss, differing, choices = (sum(values) for values in zip(*(s.router for s in stages), strict=True))
    if num_moe_layers:
        gauges |= {"train/balance_loss": balance / num_moe_layers, "train/z_loss": z_loss / num_moe_layers}
    if choices:
        sums["router/replay_differing"] = SumCount(differing, choices)
    loads = {layer: load for stage in stages for layer, load in stage.loads.items()}
    entropies = {layer: entropy for stage in stages for layer, entropy in stage.entropies.items()}
    if loads:
        gauges["router/load_max_over_mean"] = sum(loads.values()) / len(loads)
        gauges["router/entropy"] = sum(entropies.values()) / len(entropies)
        gauges |= {f"router/load_max_over_mean/layer_{layer}": load for layer, load in sorted(loads.items())}
    return sums, gauges


def metric_name(key: str) -> str:
    """The name that docs/metrics.md gives to a sum of c3po."""
    if key == "mismatch_abs":
        return "mismatch/mean_abs"
    return key.replace("mismatch_", "mismatch/", 1) if key.startswith("mismatch_") else f"train/{key}"
