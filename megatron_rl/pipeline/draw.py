"""The plots of a pipeline's report: accuracy after each stage, and the epochs among which the rule chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_rl.observe.plots import Drawing, Key, Line, css


def draw_accuracies(evaluations: Sequence[Mapping[str, Mapping[str, float]]]) -> Drawing:
    """evaluations: set -> values (accuracy, low, high) after each stage, the base model's first. A colour is a set."""
    lines = []
    for index, name in enumerate(sets(evaluations)):
        known = [(place, values[name]) for place, values in enumerate(evaluations) if name in sets([values])]
        places = np.array([place for place, _ in known], dtype=float)
        accuracy, low, high = (np.array([values[key] for _, values in known]) for key in ("accuracy", "low", "high"))
        lines.append(Line(name, css(index), places, accuracy, low=low, high=high))
    return Drawing("accuracy", lines, [Key(line.label, line.color) for line in lines], from_zero=True,
                   x="stages finished (0: the base model)")


def draw_entropies(decision: Mapping[str, Any]) -> Drawing:
    """decision: of recipes/select_checkpoint. The band of the rule is shaded, the chosen epoch ringed."""
    candidates, rule = decision["candidates"], decision["rule"]
    epochs, entropy, low, high = (np.array([each[key] for each in candidates], dtype=float)
                                  for key in ("epoch", "entropy", "entropy_low", "entropy_high"))
    (best,) = [each for each in candidates if each["path"] == decision["chosen"]]
    return Drawing("nats per token", [Line("entropy", css(0), epochs, entropy, low=low, high=high)], from_zero=True,
                   band=(rule["entropy_low"], rule["entropy_high"]), ring=(best["epoch"], best["entropy"]),
                   x="SFT epoch (ringed: chosen)")


def draw_pass_rates(decision: Mapping[str, Any]) -> Drawing:
    """pass@1 and pass@k of the same epochs on the same prompts."""
    candidates = decision["candidates"]
    epochs = np.array([each["epoch"] for each in candidates], dtype=float)
    lines = [Line(label, css(index), epochs, np.array([each[key] for each in candidates], dtype=float))
             for index, (key, label) in enumerate((("pass_at_1", "pass@1"),
                                                   ("pass_at_k", f"pass@{candidates[0]['samples']}")))]
    return Drawing("fraction of RL prompts", lines, [Key(line.label, line.color) for line in lines], from_zero=True,
                   x="SFT epoch")


def sets(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The evaluation sets that have an accuracy (a graded reward has none), in the order in which they first come."""
    return list(dict.fromkeys(name for evaluation in evaluations for name, values in evaluation.items()
                              if "accuracy" in values))
