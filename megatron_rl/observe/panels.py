"""What a report shows step by step: groups of plots, in the order in which one asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["GROUPS", "PHASES", "Plot"]


@dataclass(frozen=True)
class Plot:
    """Lines over steps.

    series: metric name -> legend label, in drawing order. constants: the same, drawn dotted.
    prefix: instead of series, a line per metric that begins so, faint for the first and strong for the last; `label`
    says how the rest of the name is shown. stacked: areas instead of these lines.
    from_zero: the axis begins at 0, as it should if the size counts and not only the change.
    smooth: long runs also get a running mean. log: the y axis is logarithmic from the start.
    """

    title: str
    unit: str
    series: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    prefix: str = ""
    label: str = "{}"
    stacked: bool = False
    from_zero: bool = False
    smooth: bool = True
    log: bool = False


GROUPS: Mapping[str, tuple[Plot, ...]] = {
    "Learning": (
        Plot("Reward", "mean reward", {"reward/mean": "mean reward"}),
        Plot("Right responses", "fraction", {"reward/pass_rate": "pass rate"}),
        Plot("Verdicts", "fraction of responses", prefix="reward/status/", stacked=True, from_zero=True),
        Plot("Groups", "fraction", {"groups/mixed_fraction": "mixed", "groups/any_correct_fraction": "any right",
                                    "groups/all_correct_fraction": "all right"}, from_zero=True,
             note="A group teaches something only if it is mixed: some responses are right and others are not."),
        Plot("Response length", "tokens", {"rollout/response_tokens_mean": "mean",
                                           "rollout/response_tokens_p10": "10th percentile",
                                           "rollout/response_tokens_p50": "median",
                                           "rollout/response_tokens_p90": "90th percentile",
                                           "rollout/response_tokens_max": "longest"}, from_zero=True),
        Plot("Truncated responses", "fraction", {"rollout/truncated_fraction": "cut at the length limit"},
             from_zero=True),
    ),
    "Tokens and agreement": (
        Plot("Tokens per step", "tokens", {"rollout/generated_tokens": "generated",
                                           "budget/selected_tokens": "trained"},
             constants={"budget/phi": "Phi"}, from_zero=True),
        Plot("Dropped tokens", "tokens", {"budget/dropped_tokens": "past the budget",
                                          "rollout/dropped_tokens": "aborted or repeated",
                                          "rollout/carried_tokens": "carried to the next step"}, from_zero=True),
        Plot("Budget fill", "selected / Phi", {"budget/fill": "fill"}, from_zero=True),
        Plot("Trainer against engine", "log-probability gap", {"mismatch/mean_abs": "mean",
                                                               "mismatch/max_abs": "largest"}, log=True),
        Plot("KL between engine and trainer", "nats per token", {"mismatch/kl": "KL"}, log=True),
        Plot("Staleness", "versions", {"rollout/staleness_mean": "mean", "rollout/staleness_max": "largest"},
             note="Publishes since the weights that sampled a token were new.", from_zero=True),
    ),
    "Policy": (
        Plot("Policy entropy", "nats per token", {"train/entropy": "entropy"}),
        Plot("KL to the reference", "nats per token", {"train/kl": "KL"}, from_zero=True),
        Plot("Clipped tokens", "fraction", {"train/clip_low_fraction": "at the lower bound",
                                            "train/clip_high_fraction": "at the upper bound"}, from_zero=True),
    ),
    "Optimiser": (
        Plot("Gradient norm", "L2 norm", {"train/grad_norm": "gradient norm"}, from_zero=True),
        Plot("Loss", "loss", {"train/loss": "loss"}),
        Plot("Learning rate", "per step", {"train/lr": "learning rate"}, from_zero=True, smooth=False),
    ),
    "Engines": (
        Plot("Engines", "number", {"rollout/engines_serving": "serving", "rollout/retries": "requests sent again"},
             from_zero=True, smooth=False),
        Plot("Queue of an engine", "requests", {"rollout/engine_queue": "waiting"}, from_zero=True),
    ),
    "Router": (
        Plot("Expert load", "max / mean", {"router/load_max_over_mean": "mean over layers"},
             note="1 is perfect balance; the number of experts over top-k is the worst case."),
        Plot("Expert load by layer", "max / mean", prefix="router/load_max_over_mean/layer_",
             label="layer {}"),
        Plot("Router entropy", "nats", {"router/entropy": "entropy"}),
        Plot("Balance loss", "before its coefficient", {"train/balance_loss": "balance loss"}),
        Plot("Router z-loss", "before its coefficient", {"train/z_loss": "z-loss"}),
    ),
    "Speed": (
        Plot("Throughput", "tokens/s", {"tokens_per_s/rollout": "rollout", "tokens_per_s/train": "training"},
             from_zero=True),
        Plot("Model FLOPs", "TFLOP/s", {"flops/model_tflops_per_s": "training"}, from_zero=True),
    ),
}
"""Heading -> plots. The first group begins with the held-out accuracy, the last ends with the time per phase."""

PHASES = ("generate", "logprobs", "train", "publish", "release")
"""The phases that follow each other in a step; time/step holds them all."""
