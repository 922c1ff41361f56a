"""Claim: a whole step - sampling, grading, training, new weights - takes less time than TRL's on the same machine.

The same Hugging Face folder, prompts, number and limit of responses, reward, loss (token mean, no KL) and optimiser,
each as its users start it: TRL's GRPOTrainer with transformers' generate on all cores; ours as `megatron-rl rl` with
two data-parallel ranks and one SGLang engine for each core, weights published after each step. Twice: with a random
model, which ends almost no response before the limit, and with one whose every token is the last with a probability of
1/64, so that lengths vary as they do in RL. The learning rate is too small to change that while it is measured. What is
sampled differs, so times are per 1,000 trained tokens. The first step of each, which warms up, is left out. The details
in the baseline say how the seconds divide. TRL: see trl_step.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.common import Row, main, median, median_ratio
from benchmarks.trl_step import RESPONSES_PER_PROMPT, write_tokenizer

PROMPTS_PER_STEP = 4
PROMPT_TOKENS = 32
MEAN_LENGTH = 64
LEARNING_RATE = 1e-6
Phases = dict[str, float]
"""Seconds per 1,000 trained tokens, of a `step` and of its parts; and how many `tokens` the step trained."""


def parity(response_tokens: int) -> float:
    """A reward that tells the responses of a group apart."""
    return float(response_tokens % 2)


def score(prompt, response_text: str) -> float:
    """For reward.routes.math: words t0 .. t9 count."""
    return parity(sum(len(word) == 2 for word in response_text.split()))


def end_responses(folder: Path, config: dict[str, Any]) -> None:
    """Changes the model so that each token is the end with a probability of about 1 / MEAN_LENGTH.

    A direction that all embeddings share comes out of the last norm with about the same size everywhere; the head's
    row of the end token is a multiple of it.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    weights = load_file(folder / "model.safetensors")
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    shared = torch.zeros(config["hidden_size"])
    shared[0] = 1.0
    embeddings += embeddings.norm(dim=1).mean() / 2 * shared
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        hidden = model.model(torch.randint(1, config["vocab_size"], (8, PROMPT_TOKENS))).last_hidden_state
    above_the_others = np.log(config["vocab_size"] / MEAN_LENGTH)
    head[config["eos_token_id"]] = above_the_others / (hidden @ shared).mean() * shared
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_prompts(path: Path, count: int, vocab: int) -> list[str]:
    rng = np.random.default_rng(0)
    prompts = [" ".join(f"t{token}" for token in rng.integers(1, vocab, PROMPT_TOKENS)) for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in prompts))
    return prompts


def run_trl(model: Path, prompts: list[str], *, steps: int, length: int) -> list[Phases]:
    """What TRL measures of each step."""
    import torch
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(os.cpu_count())
    tokens, ends, generating = [], [], []

    class Trainer(GRPOTrainer):
        def _generate(self, *arguments, **options):
            started = time.perf_counter()
            result = super()._generate(*arguments, **options)
            generating.append(time.perf_counter() - started)
            return result

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    def reward(completions, completion_ids, **_):
        tokens.append(sum(len(ids) for ids in completion_ids))
        return [score(None, text) for text in completions]

    responses = PROMPTS_PER_STEP * RESPONSES_PER_PROMPT
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, use_cpu=not torch.cuda.is_available(), bf16=False, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", adam_beta2=0.999, weight_decay=0.0, max_grad_norm=1.0, beta=0.0, epsilon=0.2,
            loss_type="dapo", scale_rewards="none", temperature=1.0, max_steps=steps, max_completion_length=length,
            per_device_train_batch_size=responses, num_generations=RESPONSES_PER_PROMPT, logging_steps=1,
            report_to="none", save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
            shuffle_dataset=False, seed=0)
        Trainer(
            model=str(model), reward_funcs=reward, args=arguments, callbacks=[Clock()],
            processing_class=PreTrainedTokenizerFast.from_pretrained(model),
            train_dataset=Dataset(InMemoryTable.from_pydict({"prompt": prompts}), fingerprint="prompts")).train()
    return [{"step": 1000 * (end - begin) / count, "generate": 1000 * generated / count, "tokens": count}
            for (begin, end), generated, count in zip(pairwise(ends), generating, tokens, strict=True)]


def run_ours(model: Path, prompts: Path, *, steps: int, length: int) -> list[Phases]:
    """What our trainer measures of each step."""
    from megatron_rl.launch.local import rank_environment

    run_dir = model.parent / "run"
    subprocess.run([
        sys.executable, "-m", "megatron_rl.cli", "rl", "parallel=dp2", f"model.path={model}", f"run.dir={run_dir}",
        f"run.steps={steps}", "run.export_hf=false", "observe.wandb=off", "observe.progress=false",
        "data.source=jsonl", f"data.path={prompts}", "data.split=all", "eval.problems=2", "eval.every_steps=0",
        "reward.routes.math=benchmarks.trl_end_to_end.score", "algo.objective=token_mean",
        "algo.advantage_scale=none", "algo.balance_coef=0", "algo.z_loss_coef=0", "algo.loss.kl_coef=0",
        "algo.loss.entropy_coef=0", f"optimizer.lr={LEARNING_RATE}", "optimizer.warmup_steps=0",
        f"rollout.prompts_per_step={PROMPTS_PER_STEP}", f"rollout.responses_per_prompt={RESPONSES_PER_PROMPT}",
        f"rollout.max_response_tokens={length}", f"rollout.max_context_tokens={length + 2 * PROMPT_TOKENS}",
        f"rollout.engine.count={os.cpu_count()}", "batch.tokens_per_microbatch=4096"],
        check=True, env=rank_environment())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{"tokens": row["budget/selected_tokens"]} | {
        phase: 1000 * row[f"time/{phase}"] / row["budget/selected_tokens"]
        for phase in ("step", "generate", "train", "publish")} for row in rows]


def measure(*, quick: bool, steps: int, length: int) -> tuple[list[Row], dict]:
    if importlib.util.find_spec("trl") is None:
        print("trl_end_to_end: TRL is not installed; benchmarks/trl_step.py says how")
        return [], {}
    workload.set_environment()
    config, steps, length = (workload.TINY_MOE, 3, 24) if quick else (workload.SMALL_MOE, steps, length)
    rows, details = [], {"trl": importlib.metadata.version("trl")}
    for lengths in ("to the limit", "lengths vary"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = workload.write_model(folder / "model", config)
            write_tokenizer(model, config["vocab_size"])
            if lengths == "lengths vary":
                end_responses(model, config)
            prompts = write_prompts(folder / "prompts.jsonl", PROMPTS_PER_STEP * (steps + 2), config["vocab_size"])
            ours = run_ours(model, folder / "prompts.jsonl", steps=steps, length=length)[1:]
            trl = run_trl(model, prompts, steps=steps, length=length)[1:]
        (ours_s, ours_generate), (trl_s, trl_generate) = (
            [[phases[name] for phases in side] for name in ("step", "generate")] for side in (ours, trl))
        title = f"TRL end to end ({lengths})"
        rows += [Row(f"{title}: seconds per 1,000 trained tokens", median(ours_s), median(trl_s), "s"),
                 Row(f"{title}: of these, generation", median(ours_generate), median(trl_generate), "s"),
                 Row(f"{title}: median of ratios of the same step", median_ratio(ours_s, trl_s), None, "",
                     None if quick else 1.0)]
        details[lengths] = {"per_1000_tokens": ours, "trl_per_1000_tokens": trl}
    return rows, details


if __name__ == "__main__":
    main("trl_end_to_end", measure, steps=6, length=256)
