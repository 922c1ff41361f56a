"""Four layers of Ling-lite at their real size on one GPU: C3PO steps on packed sequences of 8k to 24k tokens.

Random weights, bfloat16. A step is what the learner does with one batch: the pass for old log-probabilities, then
forward, backward and AdamW. Reported: tokens/s, model TFLOP/s (observe/flops.py) and peak memory. `--quick` is the
same program on a small network, for machines without a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Row, main, median
from c3po import StepTotals
from megatron_rl import topology
from megatron_rl.batch import plan_microbatches
from megatron_rl.batch.pack import pack
from megatron_rl.config.schema import AlgoConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.model.architectures import HF_FILES, parse_config
from megatron_rl.model.build import build_policy
from megatron_rl.observe.flops import train_flops
from megatron_rl.recipes.objective import TokenObjective
from megatron_rl.train_step.optimizer import build_optimizer
from megatron_rl.train_step.step import TrainStep
from megatron_rl.types import TrainSample

LAYERS = 4
TINY = {"vocab_size": 2048, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 256}


def network(*, small: bool) -> dict:
    """config.json of the slice."""
    raw = json.loads((HF_FILES / "ling_lite.json").read_text(encoding="utf-8"))
    return raw | {"num_hidden_layers": LAYERS, "max_position_embeddings": 32_768} | (TINY if small else {})


def samples(count: int, shortest: int, longest: int, vocab: int) -> list[TrainSample]:
    """Sequences of uniform length; the first sixteenth of each is its prompt."""
    rng = np.random.default_rng(0)
    made = []
    for index, length in enumerate(rng.integers(shortest, longest, count, endpoint=True)):
        mask = np.arange(length + 1) >= length // 16
        made.append(TrainSample(
            index=index, token_ids=rng.integers(0, vocab, length + 1).astype(np.int32), loss_mask=mask,
            rollout_logprobs=np.where(mask, -np.log(vocab), 0.0).astype(np.float32),
            advantage=float(rng.normal()), num_response_tokens=int(mask.sum())))
    return made


def initialise(policy, deviation: float) -> None:
    for gpt in policy.gpt_models:
        for parameter in gpt.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=deviation)


def peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(*, quick: bool, recompute: str, sequences: int, steps: int) -> tuple[list[Row], dict]:
    if not quick and not torch.cuda.is_available():
        raise ValueError("the slice at its real size needs a CUDA device; --quick runs without one")
    shortest, longest = (128, 383) if quick else (8_192, 24_575)
    raw, parallel = network(small=quick), ParallelConfig()
    here = topology.start(parallel, seed=0)
    model = parse_config(raw, "the slice")
    policy = build_policy(model, ModelConfig(dtype="bfloat16", recompute=recompute), parallel, with_gradients=True)
    initialise(policy, model.initializer_range)
    optimizer = build_optimizer(policy, OptimizerConfig(), parallel)
    step = TrainStep(policy, optimizer, here, temperature=1.0, chunk_tokens=1024)
    made = samples(sequences, shortest, longest, model.vocab_size)
    lengths = [len(sample.token_ids) - 1 for sample in made]
    plan, = plan_microbatches(lengths, dp_size=1, tokens_per_microbatch=longest + 1)
    phi = sum(int(sample.loss_mask.sum()) for sample in made)
    algo = AlgoConfig(phi=phi)
    algo = dataclasses.replace(algo, loss=dataclasses.replace(algo.loss, kl_coef=0.0))
    objective = TokenObjective(algo, StepTotals(phi=phi, selected_tokens=phi, num_responses=len(made),
                                                max_response_tokens=longest))

    def one_step() -> tuple[float, float]:
        """Seconds of the old-log-probability pass and of the update."""
        batches = [pack([made[i] for i in members], multiple_of=1, device=here.device) for members in plan]
        torch.cuda.synchronize()
        started = time.perf_counter()
        old, counts = step.count_routing(batches)
        for batch, logprobs_T in zip(batches, old, strict=True):
            batch.old_logprobs = logprobs_T
        torch.cuda.synchronize()
        between = time.perf_counter()
        result = step.update(batches, objective, lr=1e-6, balance_coef=algo.balance_coef,
                             z_loss_coef=algo.z_loss_coef, counts=counts)
        torch.cuda.synchronize()
        assert not result.skipped and result.gauges["train/selected_tokens"] == phi
        return between - started, time.perf_counter() - between

    one_step()
    passes, updates = zip(*(one_step() for _ in range(steps)), strict=True)
    tokens, flops = sum(lengths), train_flops(raw, lengths)
    whole = median([a + b for a, b in zip(passes, updates, strict=True)])
    network_name = f"{LAYERS} layers of {'a small network' if quick else 'Ling-lite'}"
    name = f"ling_lite_slice: {network_name}, {tokens} tokens in {len(plan)} micro-batches"
    rows = [Row(f"{name}: update", tokens / median(updates), None, "tokens/s"),
            Row(f"{name}: old log-probabilities and update", tokens / whole, None, "tokens/s"),
            Row(f"{name}: update", flops / median(updates) / 1e12, None, "model TFLOP/s"),
            Row(f"{name}: peak memory", peak_memory_bytes() / 1e9, None, "GB")]
    parameters = sum(parameter.numel() for gpt in policy.gpt_models for parameter in gpt.parameters())
    topology.stop()
    return rows, {"device": str(here.device), "lengths": lengths, "parameters": parameters, "recompute": recompute,
                  "logprob_seconds": passes, "update_seconds": updates}


if __name__ == "__main__":
    main("ling_lite_slice", measure, recompute="full", sequences=8, steps=3)
