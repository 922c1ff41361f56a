"""Claim: one GRPO training step takes less than half the time of TRL's GRPOTrainer on the same model and rollouts.

Both load the same Hugging Face folder and get the same prompts, responses (heavy-tailed lengths) and rewards; nothing
is generated. Advantages are rewards less their group's mean; the loss is the clipped surrogate summed over all response
tokens over their number (TRL's `dapo`, C3PO with Phi = the step's tokens), no KL, AdamW, clipping at 1. TRL's part is
its training_step calls and the optimiser, without _generate_and_score_completions; ours is everything between
assembled samples and updated weights; neither needs a pass for old log-probabilities (one update to a rollout). Losses
and gradient norms are compared.

TRL is no dependency of this project. Into a folder of its own, from the package index:

    pip install --target /tmp/trl --no-deps trl==1.16.0 datasets==5.2.0 multiprocess dill xxhash pyarrow pandas
    PYTHONPATH=/tmp/trl python -m benchmarks.trl_step
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import workload
from benchmarks.common import Row, main, median, median_ratio

LEARNING_RATE = 1e-3
RESPONSES_PER_PROMPT = 8


class Trl:
    """TRL's trainer over given rollouts; one optimiser step per call of `step`."""

    def __init__(self, path: Path, steps: list, *, microbatch: int):
        from datasets import Dataset
        from datasets.table import InMemoryTable
        from transformers import PreTrainedTokenizerFast, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        self.seconds, self.losses, self.grad_norms = [], [], []
        self._scored_s = 0.0
        outer, queue = self, iter(steps)

        class Trainer(GRPOTrainer):
            def _generate_and_score_completions(self, inputs):
                started = time.perf_counter()
                result = super()._generate_and_score_completions(inputs)
                outer._scored_s += time.perf_counter() - started
                return result

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                outer._scored_s, outer._started = 0.0, time.perf_counter()

            def on_step_end(self, *_, **__):
                outer.seconds.append(time.perf_counter() - outer._started - outer._scored_s)

            def on_log(self, args, state, control, logs=None, **__):
                if logs and "loss" in logs:
                    outer.losses.append(logs["loss"])
                    outer.grad_norms.append(logs["grad_norm"])

        def rollouts(prompts, trainer):
            outer._groups = next(queue)
            flat = [rollout for group in outer._groups for rollout in group.rollouts]
            return {"prompt_ids": [r.token_ids[~r.trainable].tolist() for r in flat],
                    "completion_ids": [r.token_ids[r.trainable].tolist() for r in flat], "logprobs": None}

        def reward(completions, **_):
            return [score.value for group in outer._groups for score in group.scores]

        count = sum(len(group.rollouts) for group in steps[0])
        with tempfile.TemporaryDirectory() as folder:
            arguments = GRPOConfig(
                output_dir=folder, use_cpu=not torch.cuda.is_available(), bf16=False, learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant", adam_beta2=0.999, weight_decay=0.0, max_grad_norm=1.0, beta=0.0,
                epsilon=0.2, loss_type="dapo", scale_rewards="none", temperature=1.0, max_steps=len(steps),
                per_device_train_batch_size=microbatch, gradient_accumulation_steps=count // microbatch,
                num_generations=RESPONSES_PER_PROMPT, logging_steps=1, report_to="none", save_strategy="no",
                gradient_checkpointing=False, disable_tqdm=True, shuffle_dataset=False, seed=0)
            self._trainer = Trainer(
                model=str(path), reward_funcs=reward, args=arguments, rollout_func=rollouts, callbacks=[Clock()],
                processing_class=PreTrainedTokenizerFast.from_pretrained(path),
                # a fingerprint of our own: datasets 5.2.0 cannot pickle pyarrow 26's types to make one
                train_dataset=Dataset(InMemoryTable.from_pydict({"prompt": [" "] * count * (len(steps) + 1)}),
                                      fingerprint="prompts"))

    def run(self) -> None:
        self._trainer.train()


def write_tokenizer(folder: Path, vocab: int) -> None:
    """One token per word `t<id>`; only its ids matter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t0").save_pretrained(folder)


def run_ours(path: Path, steps: list, longest: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds, losses and gradient norms of our step on each of the rollouts."""
    from megatron_rl import topology
    from megatron_rl.batch import assemble
    from megatron_rl.config.schema import ParallelConfig
    from megatron_rl.observe.timing import Timers
    from megatron_rl.trainer.learner import PolicyLearner

    here = topology.start(ParallelConfig(), seed=0)
    seconds, losses, norms, learner = [], [], [], None
    for number, groups in enumerate(steps):
        phi = sum(rollout.response_tokens for group in groups for rollout in group.rollouts)
        config = workload.train_config(path, objective="c3po", phi=phi, longest=longest, tokens_per_microbatch=4096,
                                       parallel=ParallelConfig(), lr=LEARNING_RATE)
        if learner is None:
            learner = PolicyLearner(config, here)
        learner.config = config
        batches = assemble(groups, config.algo, dp=1, seed=0, step=number, max_response_tokens=longest)
        started = time.perf_counter()
        (result,) = learner.learn(workload.shard_of(learner, batches), Timers())
        seconds.append(time.perf_counter() - started)
        losses.append(result.gauges["train/loss"])
        norms.append(result.gauges["train/grad_norm"])
    topology.stop()
    return seconds, losses, norms


def measure(*, quick: bool, steps: int, microbatch: int, model: str) -> tuple[list[Row], dict]:
    if importlib.util.find_spec("trl") is None:
        print("trl_step: TRL is not installed; how to install it into a folder of its own:", __doc__.split("\n\n")[-1])
        return [], {}
    workload.set_environment()
    configs = {"moe": workload.SMALL_MOE, "dense": workload.SMALL_DENSE}
    if model not in configs:
        raise ValueError(f"--model={model}: must be one of {', '.join(configs)}")
    config = workload.TINY_MOE if quick else configs[model]
    steps, responses, typical, longest, microbatch = (2, 16, 24, 96, 4) if quick else (steps, 32, 100, 1024, microbatch)
    rollouts = [workload.rollout_groups(
        workload.response_lengths(responses, median=typical, spread=1.0, longest=longest, seed=step),
        responses_per_prompt=RESPONSES_PER_PROMPT, vocab=config["vocab_size"], prompt_tokens=(16, 64), seed=step)
        for step in range(steps)]
    with tempfile.TemporaryDirectory() as folder:
        path = workload.write_model(Path(folder) / "model", config)
        write_tokenizer(path, config["vocab_size"])
        trl = Trl(path, rollouts, microbatch=microbatch)
        trl.run()
        seconds, losses, norms = run_ours(path, rollouts, longest)
    gaps = {"loss": float(np.max(np.abs(np.array(losses) - trl.losses))),
            "grad_norm": float(np.max(np.abs(np.array(norms) / trl.grad_norms - 1)))}
    first = slice(1, None) if steps > 1 else slice(None)  # libraries and caches warm up in the first step
    rows = [
        Row(f"TRL ({model}): seconds of a training step", median(seconds[first]), median(trl.seconds[first]), "s"),
        Row(f"TRL ({model}): median of ratios of the same step", median_ratio(seconds[first], trl.seconds[first]),
            None, "", None if quick else 0.5),
        Row(f"TRL ({model}): largest difference of losses", gaps["loss"], None, "", 1e-4),
        Row(f"TRL ({model}): largest relative difference of gradient norms", gaps["grad_norm"], None, "", 1e-2),
    ]
    return rows, {"seconds": seconds, "trl_seconds": trl.seconds, "losses": losses, "trl_losses": trl.losses,
                  "grad_norms": norms, "trl_grad_norms": trl.grad_norms, "trl": importlib.metadata.version("trl"),
                  "tokens": [sum(len(r.token_ids) for g in groups for r in g.rollouts) for groups in rollouts]}


if __name__ == "__main__":
    main("trl_step", measure, steps=6, microbatch=8, model="moe")
