"""What needs engines but no trainer: the prompts, the collector and held-out evaluation. No megatron here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from megatron_rl.config.schema import Config, DataConfig
from megatron_rl.data import PromptSource, build_source, is_direct_answer
from megatron_rl.observe.stats import bootstrap_interval
from megatron_rl.reward import RewardPool
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.collect import Collector, SamplingPlan
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.types import RolloutGroup


def load_tokenizer(folder: str | Path):
    """The tokenizer files of the Hugging Face folder; the model's own class is not needed for it."""
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)


def prompt_source(config: Config, data: DataConfig, tokenizer) -> PromptSource:
    rollout = config.rollout
    return build_source(data, tokenizer, max_prompt_tokens=rollout.max_context_tokens - rollout.max_response_tokens)


def heldout_data(config: Config) -> DataConfig:
    """eval.data, or the training data's held-out split under eval.seed."""
    if config.eval.data is not None:
        return config.eval.data
    return dataclasses.replace(config.data, split="heldout", seed=config.eval.seed, size=config.eval.problems)


def engine_clients(config: Config) -> list[EngineClient]:
    urls = config.rollout.engine.urls
    if not urls:
        raise ValueError("rollout.engine.urls is empty: start through `megatron-rl rl`, which starts an engine, "
                         "or give the URLs of running SGLang servers")
    return [EngineClient(url, timeout_s=config.rollout.request_timeout_s) for url in urls]


def build_collector(config: Config, clients: list[EngineClient], tokenizer, rewards: RewardPool,
                    routed_layers: RoutedLayers | None = None) -> Collector:
    return Collector(clients, config.rollout, tokenizer, rewards, seed=config.run.seed,
                     eos_token_id=tokenizer.eos_token_id, routed_layers=routed_layers)


class HeldOut:
    """Evaluates what the engines serve on a fixed set of problems; used by training, evaluate and the quick start."""

    def __init__(self, config: Config, collector: Collector, tokenizer):
        self._config, self._collector = config, collector
        source = prompt_source(config, heldout_data(config), tokenizer)
        if len(source) < config.eval.problems:
            raise ValueError(f"eval.problems={config.eval.problems}, but the evaluation data has {len(source)}")
        self._prompts = [source.prompt(i) for i in range(config.eval.problems)]

    def __call__(self, step: int) -> dict[str, float]:
        """Accuracy with its bootstrap interval over problems, style and length, as named in docs/metrics.md."""
        options = self._config.eval
        plan = SamplingPlan(samples_per_prompt=options.samples_per_problem, temperature=options.temperature,
                            top_p=options.top_p, max_response_tokens=self._config.rollout.max_response_tokens,
                            stop=self._config.rollout.stop)
        started = time.perf_counter()
        groups = self._collector.collect_blocking(self._prompts, step=step, tag="eval", plan=plan)
        correct = [[score.value for score in group.scores] for group in groups]
        mean, low, high = bootstrap_interval(correct, options.bootstrap_resamples, options.seed)
        lengths = [rollout.response_tokens for group in groups for rollout in group.rollouts]
        return {"accuracy": mean, "low": low, "high": high, "problems": len(groups),
                "samples_per_problem": options.samples_per_problem, **style(groups),
                "mean_response_tokens": float(np.mean(lengths)), "seconds": time.perf_counter() - started}


def style(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Share of responses that answer at once, and the accuracy of those that reason first."""
    judged = [(is_direct_answer(text), score.value) for group in groups
              for text, score in zip(group.texts, group.scores, strict=True)]
    reasoned = [value for direct, value in judged if not direct]
    shares = {"direct_share": 1.0 - len(reasoned) / len(judged)}
    return shares | ({"reasoning_accuracy": float(np.mean(reasoned))} if reasoned else {})
