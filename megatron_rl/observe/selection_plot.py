"""The plot of `megatron-rl select-checkpoint`: entropy and pass rates against the SFT epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_selection(candidates: Sequence[Mapping[str, Any]], low: float, high: float, chosen: str, out: Path) -> None:
    """Writes a PNG. candidates: the fields of recipes/select_checkpoint.Candidate; low, high: the rule's band."""
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    epochs = [each["epoch"] for each in candidates]
    entropy = [each["entropy"] for each in candidates]
    spread = [[each["entropy"] - each["entropy_low"] for each in candidates],
              [each["entropy_high"] - each["entropy"] for each in candidates]]
    left.axhspan(low, high, color="tab:green", alpha=0.15, label=f"{low:g} to {high:g}")
    left.errorbar(epochs, entropy, yerr=spread, marker="o", color="tab:blue", capsize=3)
    best = next(each for each in candidates if each["path"] == chosen)
    left.plot([best["epoch"]], [best["entropy"]], "o", markersize=12, markerfacecolor="none", color="tab:red",
              label="chosen")
    left.set(xlabel="SFT epoch", ylabel="policy entropy, nats per token", ylim=(0, None), xticks=epochs)
    left.legend(frameon=False)
    right.plot(epochs, [each["pass_at_1"] for each in candidates], marker="o", label="pass@1")
    right.plot(epochs, [each["pass_at_k"] for each in candidates], marker="s", label=f"pass@{best['samples']}")
    right.set(xlabel="SFT epoch", ylabel="fraction of RL prompts", ylim=(0, 1), xticks=epochs)
    right.legend(frameon=False)
    figure.savefig(out, dpi=120)
