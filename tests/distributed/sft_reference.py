"""Supervised fine-tuning in plain torch and float64, example by example; and the RL side's log-probabilities.

`python -m tests.distributed.sft_reference CONFIG.json OUT.json INDEX...` loads model.path as an RL run does and writes
the mean log-probability of the response tokens of those examples.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megatron_rl.config.load import from_json
from megatron_rl.config.schema import Config
from megatron_rl.model.tokenizer import load_tokenizer
from megatron_rl.prompts import prompt_source
from tests.distributed.reference_step import RouterLogits, router_losses
from tests.reference_bailing import bailing_logits


def batches(config: Config) -> list[list[int]]:
    """The examples of each step of every epoch: an order drawn from (seed, epoch), in slices."""
    size, options = config.sft.batch_size, config.sft
    orders = [np.random.default_rng([config.run.seed, epoch]).permutation(options.examples)
              for epoch in range(options.epochs)]
    return [order[i:i + size].tolist() for order in orders for i in range(0, options.examples - size + 1, size)]


def train(config: Config, weights: dict[str, torch.Tensor], hf_config: dict,
          steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The mean loss of each of the first `steps` steps, and the weights after them.

    The model learns from each, as AdamW with clipping has it.

    Cosine decay after a linear warm-up; vectors are not decayed.
    """
    options = config.optimizer
    source = prompt_source(config, config.data, load_tokenizer(config.model))
    weights = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [w for w in weights.values() if w.dim() > 1], "weight_decay": options.weight_decay},
         {"params": [w for w in weights.values() if w.dim() == 1], "weight_decay": 0.0}],
        betas=(options.beta1, options.beta2), eps=options.eps)
    found = []
    for step, batch in enumerate(batches(config)[:steps]):
        negative, count, router = torch.zeros((), dtype=torch.float64), 0, []
        for index in batch:
            prompt, response = source.sft_example(index)
            tokens = [*prompt.token_ids, *response]
            with RouterLogits(weights) as seen:
                logits = bailing_logits(weights, hf_config, tokens[:-1], dtype=torch.float64)
            router.append(seen.logits)
            tail = logits[len(prompt.token_ids) - 1:]
            negative = negative + F.cross_entropy(tail, torch.tensor(response), reduction="sum")
            count += len(response)
        balance, _ = router_losses([torch.cat(layer) for layer in zip(*router, strict=True)], hf_config)
        found.append(float(negative.detach() / count))
        optimizer.zero_grad()
        (negative / count + config.sft.balance_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), options.clip_grad)
        total = config.sft.schedule_steps
        warm = max(1, round(options.warmup_fraction * total))
        rate = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        optimizer.step()
    return found, {name: tensor.detach() for name, tensor in weights.items()}


def rl_logprob(config: Config, indices: Sequence[int]) -> float:
    """Mean log-probability of the examples' response tokens under the policy that an RL run starts from."""
    from megatron_rl import topology
    from megatron_rl.recipes.sft import sft_sample
    from megatron_rl.trainer.learner import PolicyLearner, packed_microbatches

    here = topology.start(config.parallel, seed=config.run.seed)
    learner = PolicyLearner(config, here)
    source = prompt_source(config, config.data, load_tokenizer(config.model))
    samples = [sft_sample(source, index, config.batch.tokens_per_microbatch) for index in indices]
    microbatches = packed_microbatches(samples, config, here, learner.policy.config)
    logprobs = learner.step.logprobs(microbatches, learner.policy)
    masked = [values[batch.loss_mask] for values, batch in zip(logprobs, microbatches, strict=True)]
    topology.stop()
    return float(torch.cat(masked).double().mean())


if __name__ == "__main__":
    path, out, *numbers = sys.argv[1:]
    Path(out).write_text(json.dumps(rl_logprob(from_json(path), [int(number) for number in numbers])))
