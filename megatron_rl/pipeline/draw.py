"""The two plots of a pipeline's report: accuracy after each stage, and the epochs among which the rule chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_rl.observe.canvas import INK, SERIES, Canvas, Drawing, Key, Line, css

BARS = {"marker": "o", "markersize": 3.5, "capsize": 2.5, "linewidth": 1.4, "elinewidth": 0.9}


def draw_accuracies(evaluations: Sequence[Mapping[str, Mapping[str, float]]]) -> Drawing:
    """evaluations: set -> values (accuracy, low, high) after each stage, the base model's first. A colour is a set."""
    canvas, lines = Canvas("accuracy"), []
    for index, name in enumerate(sets(evaluations)):
        places = np.array([place for place, values in enumerate(evaluations) if name in values], dtype=float)
        accuracy, low, high = (np.array([values[name][key] for values in evaluations if name in values])
                               for key in ("accuracy", "low", "high"))
        canvas.axes.errorbar(places, accuracy, yerr=[accuracy - low, high - accuracy], **BARS,
                             color=SERIES[index % len(SERIES)])
        lines.append(Line(name, css(index), places, accuracy))
    canvas.axes.set_xlabel("stages finished (0: the base model)")
    return canvas.finish("Accuracy after each stage", [Key(line.label, line.color) for line in lines], lines,
                         from_zero=True)


def draw_entropies(decision: Mapping[str, Any]) -> Drawing:
    """decision: of recipes/select_checkpoint. The band of the rule is shaded, the chosen epoch ringed."""
    canvas, candidates, rule = Canvas("nats per token"), decision["candidates"], decision["rule"]
    epochs, entropy, low, high = (np.array([each[key] for each in candidates], dtype=float)
                                  for key in ("epoch", "entropy", "entropy_low", "entropy_high"))
    canvas.axes.axhspan(rule["entropy_low"], rule["entropy_high"], color=SERIES[2], alpha=0.15, linewidth=0)
    canvas.axes.errorbar(epochs, entropy, yerr=[entropy - low, high - entropy], **BARS, color=SERIES[0])
    (best,) = [each for each in candidates if each["path"] == decision["chosen"]]
    canvas.axes.plot([best["epoch"]], [best["entropy"]], marker="o", markersize=10, markerfacecolor="none",
                     markeredgecolor=INK, linestyle="none")
    canvas.axes.set_xlabel("SFT epoch (ringed: chosen)")
    return canvas.finish("Entropy of the SFT epochs", (), [Line("entropy", css(0), epochs, entropy)], from_zero=True)


def draw_pass_rates(decision: Mapping[str, Any]) -> Drawing:
    """pass@1 and pass@k of the same epochs on the same prompts."""
    canvas, candidates, lines = Canvas("fraction of RL prompts"), decision["candidates"], []
    epochs = np.array([each["epoch"] for each in candidates], dtype=float)
    for index, (key, label) in enumerate((("pass_at_1", "pass@1"), ("pass_at_k", f"pass@{candidates[0]['samples']}"))):
        values = np.array([each[key] for each in candidates])
        canvas.line(epochs, values, SERIES[index], smooth=False)
        lines.append(Line(label, css(index), epochs, values))
    canvas.axes.set_xlabel("SFT epoch")
    return canvas.finish("Pass rates of the SFT epochs", [Key(line.label, line.color) for line in lines], lines,
                         from_zero=True)


def sets(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The evaluation sets that have an accuracy (a graded reward has none), in the order in which they first come."""
    return list(dict.fromkeys(name for evaluation in evaluations for name, values in evaluation.items()
                              if "accuracy" in values))
