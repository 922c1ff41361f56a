"""Evaluation of any checkpoint that an engine can serve; no trainer involved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from megatron_rl.config.load import to_dict
from megatron_rl.config.schema import Config
from megatron_rl.observe.files import write_json
from megatron_rl.recipes.evaluation import INTERVAL_PREFIX, Evaluator, Measured
from megatron_rl.recipes.serving import Serving, load_tokenizer
from megatron_rl.reward import RewardPool

RESULTS, SAMPLES = "evaluation.json", "evaluation_samples.jsonl"


def run(config: Config) -> dict[str, float]:
    """Held-out accuracy of what the engines serve, as one row; values as Evaluator returns them."""
    with RewardPool(config.reward) as rewards, Serving(config) as serving:
        rewards.warm_up()
        evaluator = Evaluator(config, serving, load_tokenizer(config.model), rewards)
        return serving.background.run(evaluator.evaluate(step=0))


def measure(config: Config) -> list[Measured]:
    """The held-out set and every benchmark; writes <run.dir>/evaluation.json and evaluation_samples.jsonl."""
    with RewardPool(config.reward) as rewards, Serving(config) as serving:
        rewards.warm_up()
        evaluator = Evaluator(config, serving, load_tokenizer(config.model), rewards)
        measured = serving.background.run(evaluator.measure(step=0))
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = {each.name: each.values for each in measured}
    write_json(folder / RESULTS, {"model": config.model.path, "results": results, "eval": to_dict(config)["eval"]})
    with (folder / SAMPLES).open("w", encoding="utf-8") as file:
        for each in measured:
            for group in each.groups:
                for text, score in zip(group.texts, group.scores, strict=True):
                    file.write(json.dumps({"set": each.name, "id": group.prompt.id, "answer": group.prompt.answer,
                                           "reward": score.value, "correct": score.correct, "status": score.status,
                                           "text": text}) + "\n")
    return measured


def table(measured: Sequence[Measured], title: str) -> Table:
    """A line for each set: accuracy (or the mean reward, if nobody can say what is right), pass@k and maj@k with 95%
    intervals."""
    means = [name for name in ("accuracy", "mean_reward") if any(
        name in each.values and (name == "accuracy" or "accuracy" not in each.values) for each in measured)]
    estimates = {key for each in measured for key in each.values if "@" in key and "_" not in key}
    estimates = sorted(estimates, key=lambda key: (key.startswith("maj"), int(key.partition("@")[2])))
    shown = Table("set", "problems", "samples", *(name.replace("_", " ") for name in means), *estimates, "tokens",
                  "truncated", title=title)
    for each in measured:
        values = each.values
        shown.add_row(each.name, str(values["problems"]), str(values["samples_per_problem"]),
                      *(_interval(values, name) for name in (*means, *estimates)),
                      f"{values['mean_response_tokens']:.0f}", f"{values['truncated_fraction']:.3f}")
    return shown


def _interval(values: dict[str, float], name: str) -> str:
    if name not in values:
        return "-"
    prefix = INTERVAL_PREFIX.get(name, f"{name}_")
    return f"{values[name]:.3f} [{values[f'{prefix}low']:.3f}, {values[f'{prefix}high']:.3f}]"
