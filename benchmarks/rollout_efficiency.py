"""Claims: the collector keeps an engine as busy as SGLang's own benchmark does, and budgets save the long tail's time.

1. Tokens per second through SyncCollector against sglang.benchmark.serving with as many requests of the same lengths
   at the same concurrency, on the same engine, in turns.
2. With heavy-tailed response lengths, the wall time per 1,000 training tokens of `budgeted` and `partial` against
   `sync`. Lengths are imposed on the engine's requests, since a random model has none of its own; the same for each.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import Row, main, median
from megatron_rl.batch import BudgetFill, assemble
from megatron_rl.config.rollout import EngineConfig, RolloutConfig
from megatron_rl.config.schema import AlgoConfig, ModelConfig
from megatron_rl.model.tokenizer import load_tokenizer
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.collectors import BudgetedCollector, Collector, PartialCollector, SyncCollector
from megatron_rl.rollout.engine_command import draw_key, engine_key
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.responses import Responder
from megatron_rl.types import Finish, Prompt, Score

# The benchmark imports Hugging Face's datasets for a data set that is not used here, and the project does not need it.
SGLANG_BENCHMARK = """
import runpy, sys, types
sys.modules["datasets"] = types.ModuleType("datasets")
sys.modules["datasets"].load_dataset = None
runpy.run_module("sglang.benchmark.serving", run_name="__main__", alter_sys=True)
"""
PROMPT_TOKENS = 32
MOST_TOKENS = 256
MEDIAN_TOKENS = 32


class LengthsFleet(Fleet):
    """A fleet whose responses have the length that `length` gives for the request's seed."""

    def __init__(self, clients, config, length):
        super().__init__(clients, config)
        self._length = length

    async def generate(self, input_ids, *, sampling, **how):
        left = self._length(sampling.seed) - (len(input_ids) - PROMPT_TOKENS)
        asked = min(sampling.max_new_tokens, left)
        result = await super().generate(
            input_ids, sampling=replace(sampling, max_new_tokens=asked, ignore_eos=True, stop_token_ids=()), **how)
        return replace(result, finish=Finish.STOP) if asked == left else result


class RandomPrompts:
    def __init__(self):
        self._numbers = itertools.count()

    def next(self, n: int) -> list[Prompt]:
        return [Prompt(str(i), tuple(np.random.default_rng(i).integers(1, 90, PROMPT_TOKENS).tolist()), "", "", "math")
                for i in itertools.islice(self._numbers, n)]


class CoinFlip:
    async def score(self, prompt: Prompt, response_text: str) -> Score:
        right = len(response_text) % 2 == 1
        return Score(float(right), "correct" if right else "wrong")


def heavy_tailed(seed: int) -> int:
    return int(np.clip(MEDIAN_TOKENS * np.exp(np.random.default_rng(seed).normal()), 1, MOST_TOKENS))


async def with_responder(url: str, config: RolloutConfig, tokenizer, length, use):
    fleet = LengthsFleet([EngineClient(url, api_key=engine_key(config.engine))], config, length)
    await fleet.start()
    try:
        return await use(Responder(fleet, config, tokenizer, CoinFlip(), seed=0, eos_token_id=0))
    finally:
        await fleet.close()


def collector_tokens_per_s(url: str, config: RolloutConfig, tokenizer, output_tokens: int) -> float:
    async def use(responder: Responder) -> float:
        collector = SyncCollector(responder, RandomPrompts(), prompts_per_step=config.prompts_per_step)
        began = time.perf_counter()
        _, ledger = await collector.collect(0, 0)
        return ledger.generated_tokens / (time.perf_counter() - began)

    return asyncio.run(with_responder(url, config, tokenizer, lambda seed: output_tokens, use))


def sglang_tokens_per_s(url: str, key: str, model: Path, requests: int, concurrency: int, output_tokens: int) -> float:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
        subprocess.run(
            [sys.executable, "-c", SGLANG_BENCHMARK, "--backend", "sglang", "--base-url", url, "--model",
             str(model), "--tokenizer", str(model), "--dataset-name", "random-ids", "--random-input-len",
             str(PROMPT_TOKENS), "--random-output-len", str(output_tokens), "--random-range-ratio", "1",
             "--num-prompts", str(requests), "--max-concurrency", str(concurrency), "--disable-stream",
             "--warmup-requests", "0", "--output-file", out.name], check=True, stdout=subprocess.DEVNULL,
            env=os.environ | {"OPENAI_API_KEY": key})  # which it sends as the engine's key
        return json.loads(Path(out.name).read_text().splitlines()[-1])["output_throughput"]


def seconds_per_1000_training_tokens(url: str, config: RolloutConfig, tokenizer, name: str, steps: int) -> float:
    algo = AlgoConfig(phi=config.prompts_per_step * config.responses_per_prompt * MEDIAN_TOKENS // 2,
                      order="groups" if name == "budgeted" else "responses")
    fill = BudgetFill(algo, 1, config.max_response_tokens)
    shared = {"prompts_per_step": config.prompts_per_step}

    def build(responder: Responder) -> Collector:
        if name == "budgeted":
            return BudgetedCollector(responder, RandomPrompts(), fill, **shared, overprovision=config.overprovision,
                                     seed=0)
        if name == "partial":
            return PartialCollector(responder, RandomPrompts(), **shared, budget_tokens=algo.phi,
                                    slice_tokens=config.slice_tokens, retention_steps=config.retention_steps,
                                    concurrency=config.concurrency)
        return SyncCollector(responder, RandomPrompts(), **shared)

    async def use(responder: Responder) -> float:
        """The first step is not counted: budgeted has no mean yet, and partial starts with nothing carried.

        The result is infinite if no group ended in the counted steps, which can happen in two steps of partial.
        """
        collector, trained, began = build(responder), 0, 0.0
        for step in range(steps + 1):
            if step == 1:
                began, trained = time.perf_counter(), 0
            groups, _ = await collector.collect(step, 0)
            if groups:
                batches = assemble(groups, replace(algo, underfull="train_short"), dp=1, seed=0, step=step,
                                   max_response_tokens=config.max_response_tokens)
                trained += sum(batch.selection.selected_tokens for batch in batches)
        return 1000 * (time.perf_counter() - began) / trained if trained else math.inf

    return asyncio.run(with_responder(url, config, tokenizer, heavy_tailed, use))


def measure(*, quick: bool, steps: int, rounds: int) -> tuple[list[Row], dict]:
    prompts, samples, output = (4, 4, 16) if quick else (32, 8, 64)
    steps, rounds = (2, 1) if quick else (steps, rounds)
    config = RolloutConfig(
        prompts_per_step=prompts, responses_per_prompt=samples, max_response_tokens=MOST_TOKENS, max_context_tokens=512,
        concurrency=64, slice_tokens=64, engine=EngineConfig(max_running_requests=64, start_timeout_s=900.0))
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_random_model(model, seed=0)
        tokenizer = load_tokenizer(ModelConfig(path=str(model)))
        draw_key(config.engine)
        with EngineProcess.from_config(config, model, log_path=Path(folder) / "engine.log") as engine:
            url = engine.base_url
            collector_tokens_per_s(url, config, tokenizer, 8)  # warm
            for _ in range(rounds):
                ours.append(collector_tokens_per_s(url, config, tokenizer, output))
                theirs.append(sglang_tokens_per_s(url, engine_key(config.engine), model, prompts * samples,
                                                  config.concurrency, output))
            seconds = {name: seconds_per_1000_training_tokens(url, config, tokenizer, name, steps)
                       for name in ("sync", "budgeted", "partial")}
    rows = [Row("rollouts: collector against SGLang's serving benchmark", median(ours), median(theirs), "tokens/s",
                None if quick else 0.95, "at least")]
    rows += [Row(f"rollouts: {name} against sync, per 1,000 training tokens", seconds[name], seconds["sync"], "s",
                 None if quick else 0.7) for name in ("budgeted", "partial")]
    return rows, {"collector_tokens_per_s": ours, "sglang_tokens_per_s": theirs,
                  "seconds_per_1000_training_tokens": seconds, "lengths": "log-normal, deviation 1, median "
                  f"{MEDIAN_TOKENS}, at most {MOST_TOKENS}"}


if __name__ == "__main__":
    main("rollout_efficiency", measure, steps=8, rounds=3)
