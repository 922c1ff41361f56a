"""Models and rollouts that several benchmarks train on: random weights, heavy-tailed lengths, random tokens."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from c3po import C3POLossConfig
from megatron_rl.config.schema import (
    AlgoConfig,
    BatchConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
)
from megatron_rl.model.fresh import random_weights
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score

# A Qwen3-MoE, because transformers, TRL and this project all load it from the same folder. The output head has a tenth
# of the linear FLOPs, as in Ling-lite.
SMALL_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 4096, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True, "tie_word_embeddings": False,
    "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "initializer_range": 0.02,
    "router_aux_loss_coef": 0.0, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None, "torch_dtype": "float32",
}
TINY_MOE = SMALL_MOE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                        "head_dim": 16, "moe_intermediate_size": 32}
SMALL_DENSE = {key: value for key, value in SMALL_MOE.items()
               if key not in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
                              "decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef")} | {
    "model_type": "llama"}


def set_environment() -> None:
    """One thread, no torch.compile (Megatron's jit_fuser), no network, no warnings; before importing megatron.core."""
    warnings.simplefilter("ignore")
    os.environ.update(TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)


def write_model(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    return write_hf_folder(folder, config, random_weights(config, seed))


def response_lengths(count: int, *, median: float, spread: float, longest: int, seed: int) -> np.ndarray:
    """int64 [count], lognormal with a heavy tail: spread 1.0 puts one response in six above 2.7 medians."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), spread, count)
    return np.clip(np.ceil(drawn), 4, longest).astype(np.int64)


def rollout_groups(lengths_N: np.ndarray, *, responses_per_prompt: int, vocab: int, prompt_tokens: tuple[int, int],
                   seed: int) -> list[RolloutGroup]:
    """Groups of responses of the given lengths with random tokens (never 0), rewards of 0 or 1, and one prompt each."""
    rng = np.random.default_rng(seed)
    groups = []
    for start in range(0, len(lengths_N), responses_per_prompt):
        prompt = rng.integers(1, vocab, rng.integers(*prompt_tokens, endpoint=True))
        rollouts, scores = [], []
        for length in lengths_N[start:start + responses_per_prompt]:
            tokens = np.concatenate([prompt, rng.integers(1, vocab, length)]).astype(np.int32)
            trainable = np.arange(len(tokens)) >= len(prompt)
            logprobs = np.where(trainable, -np.log(vocab), 0.0).astype(np.float32)
            rollouts.append(Rollout(tokens, trainable, logprobs, Finish.STOP, ()))
            right = bool(rng.integers(2))
            scores.append(Score(float(right), "correct" if right else "wrong"))
        groups.append(RolloutGroup(Prompt(str(start), tuple(prompt.tolist()), "", "", "math"), tuple(rollouts),
                                   ("",) * len(rollouts), tuple(scores)))
    return groups


def shard_of(learner, batches) -> list:
    """What this rank of a PolicyLearner trains on, of the step's batches (UpdateShards)."""
    from megatron_rl.handoff import cut_into_shards

    return cut_into_shards(batches, learner.config, asdict(learner.policy.config))[learner.topology.dp_rank]


def train_config(folder: Path, *, objective: str, phi: int, tokens_per_microbatch: int, parallel: ParallelConfig,
                 longest: int, lr: float = 1e-4, balance_coef: float = 0.0) -> Config:
    """A run without KL, entropy bonus or engine, as the benchmarks train it."""
    return Config(
        model=ModelConfig(path=str(folder)), parallel=parallel,
        algo=AlgoConfig(objective=objective, phi=phi, advantage_scale="none", balance_coef=balance_coef,
                        z_loss_coef=0.0, underfull="error", loss=C3POLossConfig(kl_coef=0.0, entropy_coef=0.0)),
        batch=BatchConfig(tokens_per_microbatch=tokens_per_microbatch),
        optimizer=OptimizerConfig(lr=lr, clip_grad=1.0),
        rollout=RolloutConfig(max_response_tokens=longest, max_context_tokens=longest + 1024))
