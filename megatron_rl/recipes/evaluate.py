"""Evaluation of any checkpoint that an engine can serve; no trainer involved."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_rl.config.load import to_dict
from megatron_rl.config.schema import Config
from megatron_rl.launch.local import RunFailed
from megatron_rl.model.tokenizer import load_tokenizer
from megatron_rl.observe.files import write_json
from megatron_rl.orchestrator.evaluation import INTERVAL_PREFIX, Evaluator, Measured
from megatron_rl.orchestrator.serving import Serving
from megatron_rl.reward import RewardPool
from megatron_rl.rollout.client import engine_clients
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.rollout.supervisor import LOADED

RESULTS, SAMPLES = "evaluation.json", "evaluation_samples.jsonl"


def run(config: Config, step: int = 0) -> dict[str, float]:
    """Held-out accuracy of what the engines serve, as one row; values as Evaluator returns them."""
    return asyncio.run(_with_evaluator(config, lambda evaluator: evaluator.evaluate(step)))


def measure(config: Config) -> list[Measured]:
    """The held-out set and every benchmark; writes <run.dir>/evaluation.json and evaluation_samples.jsonl."""
    measured = asyncio.run(_with_evaluator(config, lambda evaluator: evaluator.measure(step=0)))
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = {each.name: each.values for each in measured}
    with (folder / SAMPLES).open("w", encoding="utf-8") as file:
        for each in measured:
            for group in each.groups:
                for text, score in zip(group.texts, group.scores, strict=True):
                    file.write(json.dumps({"set": each.name, "id": group.prompt.id, "prompt": group.prompt.text,
                                           "answer": group.prompt.answer, "reward": score.value,
                                           "correct": score.correct, "status": score.status, "text": text}) + "\n")
    write_json(folder / RESULTS, {"model": config.model.path, "results": results, "eval": to_dict(config)["eval"]})
    return measured


async def _with_evaluator(config: Config, use: Callable[[Evaluator], Awaitable[Any]]) -> Any:
    with RewardPool(config.reward) as rewards:
        rewards.warm_up()
        async with Serving(config) as serving:
            return await use(Evaluator(config, serving, load_tokenizer(config.model), rewards))


@contextlib.contextmanager
def serving_model(config: Config, folder: Path) -> Iterator[None]:
    """The engines of `config` hold the model of `folder`, at the end still. RunFailed if one does not."""
    asyncio.run(_on_engines(config, folder, load=True))
    yield
    asyncio.run(_on_engines(config, folder, load=False))


async def _on_engines(config: Config, folder: Path, *, load: bool) -> None:
    clients = engine_clients(config)

    async def load_or_look(client) -> None:
        if load:
            await client.update_weights_from_disk(str(folder.resolve()), version=LOADED)
        elif await client.weight_version() != LOADED:
            raise RunFailed(f"{client.base_url} was started again while it served {folder}, so what it said may be "
                            "the base model's; its log says why")

    try:
        await asyncio.gather(*map(load_or_look, clients))
    except EngineHTTPError as error:
        raise RunFailed(f"the engines could not serve {folder}: {error}") from error
    finally:
        await asyncio.gather(*(client.close() for client in clients))


def table(measured: Sequence[Measured], title: str) -> Table:
    """A line for each number of each set, so that any number of estimates fits 80 columns: accuracy (or the mean
    reward, if nobody can say what is right), pass@k and maj@k with 95% intervals, then lengths."""
    shown = Table("set", "measured", "value", "95% interval", title=title)
    for each in measured:
        values = each.values
        estimates = sorted((key for key in values if "@" in key and "_" not in key),
                           key=lambda key: (key.startswith("maj"), int(key.partition("@")[2])))
        name = f"{each.name}\n{values['problems']} x {values['samples_per_problem']}"
        for key in ("accuracy" if "accuracy" in values else "mean_reward", *estimates):
            prefix = INTERVAL_PREFIX.get(key, f"{key}_")
            shown.add_row(name, key.replace("_", " "), f"{values[key]:.3f}",
                          f"{values[f'{prefix}low']:.3f} - {values[f'{prefix}high']:.3f}")
            name = ""
        shown.add_row("", "response tokens", f"{values['mean_response_tokens']:.0f}", "")
        shown.add_row("", "truncated", f"{values['truncated_fraction']:.3f}", "", end_section=True)
    return shown
