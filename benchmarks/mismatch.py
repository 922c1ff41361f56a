"""Claim: in bfloat16 the trainer and an engine on a CPU give a sampled token nearly the same log-probability.

A Mixture-of-Experts model of random bfloat16 weights whose logits are as spread as a trained model's (standard
deviation 3) is served by an engine, which samples responses. The trainer, one rank in bfloat16, then computes the same
tokens' log-probabilities. What is left has two causes: products of other shapes, and tokens whose experts differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import workload

SIZES = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6,
         "num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": 16, "num_experts_per_tok": 4,
         "num_shared_experts": 1, "moe_intermediate_size": 256, "max_position_embeddings": 1024, "eos_token_id": 8191,
         "torch_dtype": "bfloat16"}
LOGIT_DEVIATION = 3.0


def write_model(folder: Path, *, norm_head: bool) -> Path:
    """The last norm's weight gives the logits their spread: a plain head has elements of deviation 0.02, NormHead's
    columns have norm 1."""
    from megatron_rl.data import chains_tokenizer
    from megatron_rl.model.fresh import bailing_config, random_weights
    from megatron_rl.model.hf_folder import write_hf_folder

    config = bailing_config(**SIZES, norm_head=norm_head)
    deviation = config["vocab_size"] ** -0.5 if norm_head else 0.02
    spread = LOGIT_DEVIATION / deviation / config["hidden_size"] ** 0.5
    weights = ((name, torch.full_like(tensor, spread) if name == "model.norm.weight" else tensor)
               for name, tensor in random_weights(config, 0))
    tokenizer = folder.with_name("tokenizer")
    chains_tokenizer(tokenizer)
    return write_hf_folder(folder, config, weights, tokenizer_from=tokenizer)


async def sample(client: Any, prompts: list[list[int]], tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, log-probabilities) of each response."""
    from megatron_rl.rollout.sampling import SamplingParams

    params = SamplingParams(1.0, tokens, ignore_eos=True)
    try:
        results = await asyncio.gather(*(client.generate(prompt, rid=f"mismatch-{number}", sampling=params)
                                         for number, prompt in enumerate(prompts)))
    finally:
        await client.close()
    return [(result.output_ids, result.logprobs) for result in results]


def differences(folder: Path, overrides: list[str], responses: int, tokens: int, here: Any) -> np.ndarray:
    """|trainer - engine| of every sampled token, in nats."""
    from megatron_rl.batch import by_sample
    from megatron_rl.config.load import load
    from megatron_rl.launch.local import engines_for
    from megatron_rl.rollout.client import engine_clients
    from megatron_rl.trainer.learner import build_trainable, packed_microbatches
    from megatron_rl.types import TrainSample

    config = load([f"model.path={folder}", "model.dtype=bfloat16", f"rollout.max_response_tokens={tokens}",
                   "rollout.max_context_tokens=1024", "rollout.engine.start_timeout_s=600",
                   "rollout.request_timeout_s=1200", *overrides])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(SIZES["vocab_size"] - 1, size=int(rng.integers(8, 33))).tolist() for _ in range(responses)]
    with engines_for(config, str(folder), folder.parent / "engine.log") as served:
        (client,) = engine_clients(served)
        sampled = asyncio.run(sample(client, prompts, tokens))
    samples = []
    for index, (prompt, (ids, logprobs)) in enumerate(zip(prompts, sampled, strict=True)):
        whole = np.concatenate([prompt, ids]).astype(np.int32)
        mask = np.arange(len(whole)) >= len(prompt)
        samples.append(TrainSample(index, whole, mask, np.concatenate([np.zeros(len(prompt)), logprobs]).astype(
            np.float32), 0.0, len(ids)))
    policy, _, step = build_trainable(config, here, temperature=1.0)
    microbatches = packed_microbatches(samples, config, here, policy.config)
    found = []
    for batch, logprobs_T in zip(microbatches, step.logprobs(microbatches), strict=True):
        found += [(logprobs - rollout)[mask].abs() for logprobs, rollout, mask in zip(
            *(by_sample(batch, values) for values in (logprobs_T, batch.rollout_logprobs, batch.loss_mask)),
            strict=True)]
    return torch.cat(found).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mismatch", description=__doc__)
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as model.fp32_lm_head=false")
    arguments = parser.parse_args()
    workload.set_environment()
    from megatron_rl import topology
    from megatron_rl.config.schema import ParallelConfig

    here = topology.start(ParallelConfig(), seed=0)
    for norm_head in (False, True):
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_model(Path(scratch) / "model", norm_head=norm_head)
            gaps = differences(folder, arguments.overrides, arguments.responses, arguments.tokens, here)
        print(json.dumps({"norm_head": norm_head, "overrides": arguments.overrides, "tokens": len(gaps),
                          "mean": round(float(gaps.mean()), 6),
                          "p99.9": round(float(np.quantile(gaps, 0.999)), 5), "max": round(float(gaps.max()), 5)}))


if __name__ == "__main__":
    main()
